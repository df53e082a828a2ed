"""From a cache to a trained head: recipe, plan of the folds, batches, the loop, records to resume from."""
