"""The training worker: loop, model, optimizer, checkpoints, the finished folder; rows and scores come from elsewhere."""
