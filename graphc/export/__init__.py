"""From a torch module to an ONNX model that keeps the module's names: the parts of ``graphc.frontends.torch``.

``arguments`` reads the example inputs, ``dims`` chooses the axes that stay dynamic, ``capture`` gets the FX graph of
``torch.export``, ``translate`` makes the ONNX model and ``naming`` its names, ``trouble`` says what went wrong and
where. torch is imported when a function is called.
"""
