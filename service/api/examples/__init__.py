"""Examples in the OpenAPI document; tests send the requests, and hold the answers against their schemas."""
