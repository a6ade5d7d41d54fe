"""The modules of a quantized model: what lowering puts in place of a linear or a parameter."""
