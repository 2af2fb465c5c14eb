
// A run's page is kept as new as its files. Everything on it can be read and pressed without this script.

const live = document.getElementById("live");
let listener = null;
let busy = false;
let again = false;
let pause = 0;

// Folds by their place, since their titles count.
function folds(root) {
  return [...root.querySelectorAll("details")].map((fold) => {
    const around = fold.closest("section");
    const all = [...(around || root).querySelectorAll("details")];
    return [`${around ? around.id : ""} ${all.indexOf(fold)}`, fold];
  });
}

async function renew() {
  again = busy;
  if (busy || document.hidden) return;
  busy = true;
  const began = performance.now();
  pause = 0;
  try {
    const answer = await fetch(live.dataset.page);
    if (!answer.ok) throw new Error(answer.statusText);
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("live");
    const open = new Map(folds(live).map(([place, fold]) => [place, fold.open]));
    for (const [place, fold] of folds(fresh)) if (open.has(place)) fold.open = open.get(place);
    live.replaceChildren(...fresh.childNodes);
    readable(live);
    for (const printed of live.querySelectorAll(".console")) printed.scrollTop = printed.scrollHeight;
    live.dataset.changes = fresh.dataset.changes;
  } catch {
    lost();
    again = true;
    pause = 5000;
  }
  // A large run takes the server a while to show: three quarters of the time is left to training.
  setTimeout(() => {
    busy = false;
    if (again) renew();
  }, pause + 3 * (performance.now() - began));
}

function lost() {
  const told = live.querySelector("[role=status]");
  if (told) told.textContent = "Connection lost: the run goes on; open the address that `schoolhouse serve` prints.";
}

// A browser opens six connections to one address: a page that nobody looks at gives its own back.
function listen() {
  if (listener) listener.close();
  listener = null;
  if (document.hidden) return;
  listener = new EventSource(live.dataset.changes);
  listener.addEventListener("message", renew);
  listener.addEventListener("error", () => { if (listener.readyState === EventSource.CLOSED) lost(); });
}

if (live) {
  listen();
  document.addEventListener("visibilitychange", listen); // it tells of what changed meanwhile
}
