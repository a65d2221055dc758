// The code of a link follows the # of its address, which is not sent: it is in no log, and a preview of the
// link does not use it up. On MLflow's pages that part names a run, and the form takes it along.
const form = document.getElementById("sign-in");
const given = new URLSearchParams(location.hash.slice(1));

async function continueIfSignedIn() {
  // The session cookie is not sent when a link on another site leads here, but it is with this request.
  const answer = await fetch("/sign-in/session");
  if (answer.ok && (await answer.json()).is_signed_in) {
    const target = form.next.value;
    if (location.pathname === "/sign-in") location.replace(target + location.hash);
    else location.replace(`/sign-in?next=${encodeURIComponent(target)}${location.hash}`);
  }
}

// MLflow opens its assistant on the first visit from this machine, over the runs. The service does not forward
// the assistant's requests, so it would only show an error. Storage may be switched off.
try {
  localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
} catch {}

if (location.pathname === "/sign-in" && given.has("code")) {
  form.code.value = given.get("code");
  form.next.value = given.get("next");
  history.replaceState(null, "", "/sign-in");
  form.submit();
} else {
  form.addEventListener("submit", () => {
    form.next.value += location.hash;
  });
  continueIfSignedIn();
}
