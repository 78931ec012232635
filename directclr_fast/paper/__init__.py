"""The paper's experiments and measures: spectra of representations and embeddings."""
