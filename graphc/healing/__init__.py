"""Healing: a short distillation of a model's original into what passes have made of it.

``objective`` says what is compared, ``weights`` what is trained and what stays zero, ``training`` how. torch is
imported by these modules; import them inside functions.
"""
