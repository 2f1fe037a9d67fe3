"""What a Python channel backend imports to call Concord."""

from concord.client import Concord
from concord.customers import Customer, user
from concord.errors import ErrorDetails, error_details
from concord.transport import tls

__all__ = ["Concord", "Customer", "ErrorDetails", "error_details", "tls", "user"]
