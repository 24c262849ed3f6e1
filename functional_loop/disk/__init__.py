"""Files that last: checkpoints, the folders that they are in, and who may write there."""
