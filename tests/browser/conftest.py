"""Chromium, and visitors whose pages must stay without errors."""

import html
import os
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.browser.populated import PopulatedApi
from tests.service.running_api import TOKEN

SECONDS = 30
ABORTED = ("htmx:afterRequest", "htmx:sendAbort")
"""Messages of htmx about a request that a newer one replaced; a failed one has `sendError` as well."""
expect.set_options(timeout=SECONDS * 1000)
REPORT_VIOLATIONS = """document.addEventListener("securitypolicyviolation", (event) =>
  console.error(`content policy: ${event.violatedDirective} ${event.blockedURI} ${event.sample}`));"""


class Visitor:
    """Page of one browser context, with what went wrong on it."""

    def __init__(self, browser, url, *, signed_in=True, allowed=(), may_fail=False, **options):
        """Open a page; hosts of other addresses than `url` and `allowed` are out of reach.

        With `may_fail`, errors on its console do not count.
        """
        self.may_fail = may_fail
        self.hosts, self.problems = {urlsplit(each).netloc for each in (url, *allowed)}, []
        self.context = browser.new_context(base_url=url, **options)
        self.context.set_default_timeout(SECONDS * 1000)
        self.context.add_init_script(REPORT_VIOLATIONS)
        self.context.route("**/*", self._refuse_others)
        self.page = self.context.new_page()
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        if signed_in:
            self.sign_in()

    def sign_in(self, token=TOKEN):
        self.page.goto("/sign-in")
        self.page.get_by_label("Token").fill(token)
        self.page.get_by_role("button", name="Sign in").click()
        self.page.get_by_role("button", name="Sign out").wait_for()

    def _refuse_others(self, route):
        if urlsplit(route.request.url).netloc in self.hosts:
            route.continue_()
        else:
            self.problems.append(f"request to another host: {route.request.url}")
            route.abort()

    def _on_console(self, message):
        if message.text.startswith(ABORTED):
            return
        if message.type in ("error", "warning") and not self.may_fail:
            self.problems.append(f"console: {message.text}")


@pytest.fixture(scope="package")  # while it is there, no event loop can run in this thread
def chromium():
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("tests of pages need Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def api(tmp_path_factory):
    """One API with fakes of Ray and MLflow for all tests of pages."""
    api = PopulatedApi(tmp_path_factory.mktemp("api"))
    api.start()
    yield api
    api.stop()


@pytest.fixture(scope="package")
def ids(api):
    """Ids of jobs by state, and of a comparison; tests leave them as they are."""
    return api.populate()


@pytest.fixture(scope="package")
def elsewhere():
    """Another site, whose page has a link and a form that lead to the address `to` of its query."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            target = html.escape(unquote(self.path.partition("to=")[2]))
            form = f'<form method="post" action="{target}"><button>x</button></form>'
            page = f'<!doctype html><a href="{target}">x</a>{form}'
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://localhost:{server.server_port}"  # a host name of its own, so another site
        server.shutdown()
        thread.join(10)


@pytest.fixture
def visit(chromium, request):
    """Open pages as new visitors, by default of `api`; none of them may meet an error."""
    visitors = []

    def make(url=None, **options):
        visitors.append(Visitor(chromium, url or request.getfixturevalue("api").url, **options))
        return visitors[-1]

    yield make
    problems = [problem for visitor in visitors for problem in visitor.problems]
    for visitor in visitors:
        visitor.context.close()  # which ends requests of the page, as htmx reports on its console
    assert problems == []
