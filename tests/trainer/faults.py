"""Errors of gloo for tests."""


def gloo_error(kind):
    """Return gloo's error for a peer that is gone or silent."""
    words = {
        "closed": "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer "
        "[127.0.0.1]:5000",
        "reset": "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Read error [127.0.0.1]:5000: "
        "Connection reset by peer",
        "timeout": "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting "
        "20000ms for recv",
        "application": "[../third_party/gloo/gloo/transport/tcp/pair.cc:161] Application timeout caused "
        "pair closure",
    }
    return RuntimeError(words[kind])
