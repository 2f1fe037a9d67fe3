"""What the data means: schema, Feast repository, behaviours, ranking signals, importers and materialization."""
