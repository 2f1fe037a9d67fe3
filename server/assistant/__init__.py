"""Customer service: what customers ask, answered from articles and live facts."""
