"""The floor of qfx: graphs, sites, maps, grids and quantized tensors. Imports torch and nothing of qfx above it."""
