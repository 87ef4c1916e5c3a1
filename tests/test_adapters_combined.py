"""Several adapters in one model: combined as PEFT does it, and by methods that it lacks."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphc.adapters import Adapters, adapted, merging
from graphc.errors import BadInput
from tests.adapter_models import (
    FLOAT,
    NET,
    L,
    base,
    fold,
    lora,
    merged,
    plain,
    same,
    source,
    torch,
    trained,
    weights,
)


@pytest.mark.parametrize(
    "method", ["cat", "linear", "svd", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"]
)
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_combined_as_peft_does(method: str, sign: str, tmp_path: Path) -> None:
    if sign == "frequency" and "ties" not in method:
        pytest.skip("it elects no signs")
    names, factors = ["a", "b", "c"], [0.7, -0.4, 1.2]
    configs = [L(r=3, lora_alpha=4, target_modules=["q", "v", "conv", "emb"]) for _ in names]
    model = trained(NET, configs[0], tmp_path / "a")
    for name, config in zip(names[1:], configs[1:], strict=True):
        trained(NET, config, tmp_path / name, seed=ord(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names[1:]:
            model.load_adapter(tmp_path / name, name)
        options = {"density": 0.4, "majority_sign_method": sign} if method not in ("cat", "linear", "svd") else {}
        model.add_weighted_adapter(["default", *names[1:]], factors, "all", combination_type=method, **options)
        model.set_adapter("all")
    wanted = merged(model)
    given = [f"{tmp_path / name}={factor}" for name, factor in zip(names, factors, strict=True)]
    text = f"{method}{{density=0.4 sign={sign}}}" if options else method
    found, _ = fold(base(NET), *given, combine=text)
    same(weights(found), wanted, 1e-5)


def test_dare_with_the_same_mask_as_peft() -> None:
    task = np.random.default_rng(0).standard_normal((40, 50))
    kept = merging.dropped(task, 0.3, np.random.default_rng(1))
    from peft.utils import merge_utils

    mask = torch.tensor((kept != 0).astype(np.float64))
    torch.bernoulli, original = lambda *_, **__: mask, torch.bernoulli
    try:
        wanted = merge_utils.random_pruning(torch.tensor(task), 0.3, rescale=True).numpy()
    finally:
        torch.bernoulli = original
    np.testing.assert_allclose(kept, wanted, rtol=1e-12)
    assert abs((kept != 0).mean() - 0.3) < 0.05


@pytest.mark.parametrize(
    "method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd", "della", "ties{of=delta}", "star"]
)
def test_other_combinations_are_seeded_and_do_something(method: str, tmp_path: Path) -> None:
    for name in "ab":
        trained(NET, L(r=2, target_modules=["q", "v"]), tmp_path / name, seed=ord(name))
    folders = [tmp_path / "a", tmp_path / "b"]
    how = Adapters.of(folders, combine=method)
    first, again, other = (weights(adapted(source(base(NET)), how, seed).model) for seed in (0, 0, 1))
    plain = weights(fold(base(NET), *folders)[0])
    assert np.array_equal(first["q.weight"], again["q.weight"])
    random = method.startswith(("dare", "della"))
    assert np.array_equal(first["q.weight"], other["q.weight"]) != random
    assert not np.allclose(first["q.weight"], plain["q.weight"])


def test_star_keeps_the_nuclear_norm() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((9, 4)), rng.standard_normal((4, 7))
    u, v = merging.truncated(left, right, 0.4)
    before, after = (np.linalg.svd(m, compute_uv=False) for m in (left @ right, u @ v))
    assert after.sum() == pytest.approx(before.sum())
    kept = int((after > 1e-9).sum())
    assert before[: kept - 1].sum() < 0.4 * before.sum() <= before[:kept].sum() + before[kept - 1]
    np.testing.assert_allclose(after[:kept] / after[0], before[:kept] / before[0])


def test_della_keeps_large_values_more_often() -> None:
    task = np.tile(np.arange(1.0, 101.0), (2000, 1))
    kept = merging.sampled(task, 0.5, 0.2, np.random.default_rng(0))
    rate = (kept != 0).mean(axis=0)
    np.testing.assert_allclose(rate, 0.3 + 0.4 * np.arange(100) / 99, atol=0.06)
    np.testing.assert_allclose(kept.mean(axis=0), task[0], rtol=0.2)  # unbiased


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    order=st.permutations([0, 1, 2]), factors=st.tuples(FLOAT, FLOAT, FLOAT), method=st.sampled_from(["cat", "linear"])
)
def test_the_order_of_adapters_does_not_matter(
    order: list[int], factors: tuple[float, ...], method: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folders = [tmp_path_factory.getbasetemp() / f"order-{i}" for i in range(3)]
    for i, folder in enumerate(folders):
        if not folder.exists():
            trained(NET, L(r=2, target_modules=["q", "v"]), folder, seed=i)
    given_ = [f"{folder}={factor}" for folder, factor in zip(folders, factors, strict=True)]
    first, _ = fold(base(NET), *given_, combine=method)
    other, _ = fold(base(NET), *(given_[i] for i in order), combine=method)
    same(weights(other), weights(first), 1e-5)


def test_methods_on_factors_need_equal_ranks(tmp_path: Path) -> None:
    folders = [lora(tmp_path / "a", layer__q=(6, 8)), lora(tmp_path / "b", rank=3, layer__q=(6, 8))]
    with pytest.raises(BadInput, match=r"needs adapters of one rank(.|\n)*2 and 3"):
        fold(plain(), *folders, combine="linear")
    for method in ("cat", "svd", "ties{of=delta}", "della", "star"):
        assert fold(plain(), *folders, combine=method)[1].adapted is not None
