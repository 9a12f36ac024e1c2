// Keeps the page as it is on the server: each event brings the sections that have changed, and what
// stayed the same in them is left alone, with its focus and whether it is open.
"use strict";

const live = document.getElementById("live");

function say(words) {
  if (live.textContent !== words) live.textContent = words;
}

// Makes the element `old` the same as `fresh`.
function renew(old, fresh) {
  for (const { name } of [...old.attributes]) {
    if (name !== "open" && !fresh.hasAttribute(name)) old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  const wanted = new Set([...fresh.children].map((child) => child.id));
  for (const child of [...old.children]) {
    if (child.id && !wanted.has(child.id)) child.remove();
  }
  const known = new Map([...old.children].map((child) => [child.id, child]));
  let at = old.firstChild;
  for (const child of [...fresh.childNodes]) {
    const same = child.id ? known.get(child.id) : at;
    if (!same || same.nodeName !== child.nodeName || (same.id || "") !== (child.id || "")) {
      old.insertBefore(child, at);
      continue;
    }
    if (same === at) at = at.nextSibling;
    else old.insertBefore(same, at);
    if (same.nodeType === Node.ELEMENT_NODE) renew(same, child);
    else if (same.data !== child.data) same.data = child.data;
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

let events = null;
let again = 0;

// Who looks elsewhere costs the gateway nothing.
function connect() {
  clearTimeout(again);
  if (events) events.close();
  events = null;
  if (document.hidden) return;
  events = new EventSource("/page/events");
  events.onmessage = (event) => {
    say("Live");
    for (const [name, html] of Object.entries(JSON.parse(event.data))) {
      const holder = document.createElement("template");
      holder.innerHTML = html;
      renew(document.getElementById(name), holder.content.firstElementChild);
    }
  };
  events.onerror = () => {
    say("Not connected");
    // A refusal ends it for good; a connection that broke is made again by itself.
    if (events.readyState === EventSource.CLOSED) again = setTimeout(connect, 5000);
  };
}

document.addEventListener("visibilitychange", connect);
connect();
