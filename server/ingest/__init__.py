"""From an event to durable, visible state: identities, group commit and recovery."""
