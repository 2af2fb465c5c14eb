
// A run's page is kept as new as its files. Everything on it can be read and pressed without this script.

const live = document.getElementById("live");

function folds(root) {
  return [...root.querySelectorAll("details")].map((fold) => [fold.querySelector("summary").textContent, fold]);
}

async function renew() {
  const answer = await fetch(location.href);
  if (!answer.ok) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("live");
  if (!fresh) return;
  const open = new Map(folds(live).map(([title, fold]) => [title, fold.open]));
  for (const [title, fold] of folds(fresh)) if (open.has(title)) fold.open = open.get(title);
  live.replaceChildren(...fresh.childNodes);
  readable(live);
  for (const printed of live.querySelectorAll(".console")) printed.scrollTop = printed.scrollHeight;
}

if (live) new EventSource(live.dataset.changes).addEventListener("message", renew);
