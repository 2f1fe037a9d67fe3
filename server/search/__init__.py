"""Finding items by words: searches as slates, their events and facets, and completions of what is typed."""
