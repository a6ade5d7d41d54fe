"""Checkpoints that other engines load: one format a file, written from and read into quantized linears."""
