// The API key, where the service wants one: asked for once, kept for as long as the tab is open, sent to this service
// alone.

import { byId } from "./dom.js";

const STORED = "ironclip-key";

let key = null; // in memory, where the browser allows no storage
let asking = null; // the question that is on the page now: whoever comes meanwhile waits for the same answer

/** The headers that a request takes along. */
export function keyHeaders() {
  return current() ? { Authorization: `Bearer ${current()}` } : {};
}

/** Whether there is a key. */
export function current() {
  if (key === null) {
    try {
      key = sessionStorage.getItem(STORED);
    } catch {
      // No storage allowed: the key lasts as long as the page.
    }
  }
  return key;
}

/** Ask for a key; why: what the service said. Resolves with whether one was given. */
export function askForKey(why) {
  asking ??= ask(why).finally(() => (asking = null));
  return asking;
}

function ask(why) {
  const [dialog, form, input] = [byId("key-dialog"), byId("key-form"), byId("key")];
  byId("key-why").textContent = why;
  input.value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const end = (given) => {
      form.removeEventListener("submit", submitted);
      dialog.removeEventListener("close", closed);
      if (dialog.open) dialog.close();
      resolve(given);
    };
    const submitted = (event) => {
      event.preventDefault();
      keep(input.value.trim());
      input.value = "";
      end(true);
    };
    const closed = () => end(false);
    form.addEventListener("submit", submitted);
    dialog.addEventListener("close", closed);
  });
}

function keep(value) {
  key = value;
  try {
    sessionStorage.setItem(STORED, value);
  } catch {
    // As above.
  }
}
