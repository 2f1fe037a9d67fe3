"""What stands in Redis: user state in Feast's layout, committed slates and the fleet's pointers."""
