"""The Runner of a GPU: steps of fixed sizes, captured as CUDA graphs and replayed."""
