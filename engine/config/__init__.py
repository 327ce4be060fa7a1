"""The DeepSpeed JSON and its section `hd_pissa`: read, refused, filled."""
