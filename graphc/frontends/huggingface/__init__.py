"""Hugging Face model folders as graphs: what ``save_pretrained`` writes, read by transformers' own rules."""
