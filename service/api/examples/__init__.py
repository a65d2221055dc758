"""Examples in the OpenAPI document.

Tests send the requests and validate the answers against their schemas.
"""
