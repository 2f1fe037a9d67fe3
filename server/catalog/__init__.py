"""The catalogue online: offers joined live, index epochs published."""
