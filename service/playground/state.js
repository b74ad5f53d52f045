// What the page shows, as the part of its address behind "#", so that a view can be shared.

export const EFFORTS = ["quick", "standard", "thorough"];
export const MOST_EPS = 32;
export const FIRST_EPS = 16;
export const FIRST_SET = "emoji";
const LIST = ["labels", "encoders"];
const TEXT = ["sample", "set", "truth", "defence", "effort"];

/** The labels in a text: one a line, or commas between; each once. */
export function parseLabels(text) {
  return [...new Set(text.split(/[\n,]/).map((part) => part.trim()).filter(Boolean))];
}

/** The state in an address; what is not there is undefined, so that the page's defaults hold. */
export function readHash(hash = location.hash) {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const state = {};
  for (const name of TEXT) if (given.has(name)) state[name] = given.get(name);
  for (const name of LIST) if (given.has(name)) state[name] = parseLabels(given.get(name));
  if (!EFFORTS.includes(state.effort)) delete state.effort;
  const eps = Number(given.get("eps"));
  if (Number.isInteger(eps) && eps >= 1 && eps <= MOST_EPS) state.eps = eps;
  return state;
}

/** Put the state into the address without a step in the browser's history. */
export function writeHash(state) {
  const shown = new URLSearchParams();
  for (const name of TEXT) if (state[name] !== undefined) shown.set(name, state[name]);
  for (const name of LIST) if (state[name] !== undefined) shown.set(name, state[name].join(","));
  shown.set("eps", state.eps);
  if (state.set) shown.delete("labels");
  const hash = `#${shown}`;
  if (hash !== location.hash) history.replaceState(null, "", hash);
}
