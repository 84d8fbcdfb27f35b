"""Expert bundles made of model folders: what a fine-tune changed, packed with its gate rows and probe vectors."""
