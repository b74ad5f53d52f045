// The page: what is chosen on the left is classified at once, and attacked when asked to, one column an encoder.

import * as api from "./api.js";
import { Card } from "./card.js";
import { Controls } from "./controls.js";
import { byId } from "./dom.js";
import { Picture } from "./picture.js";
import { runProbe } from "./probing.js";
import { readHash, writeHash } from "./state.js";

const TOP_K = 1000; // more than is shown: where a label stood that an attack brings forward
const TYPING_MS = 300;
const LOADING_MS = 1000;

const cards = new Map(); // name -> Card, for the encoders chosen
let models = new Map();
let controls;
let picture;
let current = null; // the picture: {base64, image, sample}
let classifying = null; // AbortController of the classifications under way
let attacking = null; // AbortController of the attack under way
let timer = 0; // of the classification that waits for the typing to end
let classified = Promise.resolve(); // the last classification's end

async function start() {
  watchTheme();
  const [listed, sets, samples] = await Promise.all([whenLoaded(), api.labelSets(), api.samples()]);
  models = new Map(listed.models.map((model) => [model.name, model]));
  // Older services list defences by name alone.
  const defences = (listed.defences ?? ["none"]).map((one) => (typeof one === "string" ? one : one.name));
  const labels = samples.map((sample) => sample.label);
  const offer = { models: listed.models, defaultName: listed.default, defences, labelSets: sets, labels };
  controls = new Controls(offer, changed);
  picture = new Picture(samples, pictured, fault);
  byId("panel").addEventListener("submit", (event) => {
    event.preventDefault();
    attack();
  });
  byId("cancel").addEventListener("click", () => attacking?.abort());
  addEventListener("hashchange", () => restore());
  addEventListener("pagehide", () => attacking?.abort()); // else the service would search on for nobody
  await restore();
  byId("panel").inert = false; // what was typed before would have been overwritten
}

/** The list of models, once the encoders are loaded. */
async function whenLoaded() {
  for (;;) {
    try {
      const listed = await api.models();
      if (listed.models.length) return say("", listed);
    } catch (error) {
      if (error.status !== 503) throw error;
    }
    say("The service is loading its encoders …");
    await new Promise((resolve) => setTimeout(resolve, LOADING_MS));
  }
}

/** Show the view that the address describes. */
async function restore() {
  const state = readHash();
  await controls.set(state);
  const first = picture.samples[0]?.name;
  const wanted = state.sample ?? (current?.sample?.name || first);
  restoring = true;
  if (!picture.takeNamed(wanted) && !current) {
    say("This view was made with a picture that is not here: choose one.");
    changed("decision");
  }
}

// The first picture after a view is restored comes with the view's own true label, if that names one.
let restoring = false;

function pictured(next) {
  current = next;
  const kept = restoring && readHash().truth !== undefined;
  restoring = false;
  if (!kept) controls.suggestTruth(next.sample?.label);
  changed("decision");
}

/** Something was chosen anew. `what`: "decision", or "attack" if no score can have changed. */
function changed(what) {
  const values = controls.values();
  writeHash({ ...values, sample: current ? (current.sample?.name ?? "own") : readHash().sample });
  byId("fault").hidden = true;
  if (what === "attack") {
    for (const card of cards.values()) if (card.run.state === "idle") card.reset(values.eps);
    return;
  }
  stopAttack();
  arrange(values);
  clearTimeout(timer);
  timer = setTimeout(classifyNow, TYPING_MS);
}

/** One column for each encoder chosen, in the service's order. */
function arrange(values) {
  for (const name of cards.keys()) if (!values.encoders.includes(name)) cards.delete(name);
  for (const name of values.encoders) {
    if (!cards.has(name)) cards.set(name, new Card(models.get(name), () => [...cards.values()]));
  }
  const shown = values.encoders.map((name) => cards.get(name));
  const now = [...byId("cards").children];
  if (shown.length !== now.length || shown.some((card, i) => card.element !== now[i])) {
    byId("cards").replaceChildren(...shown.map((card) => card.element));
  }
  for (const card of shown) {
    card.reset(values.eps);
    card.figures.drawClean(current?.image);
  }
}

/** What every request says of the decision. */
function decision(values, encoder) {
  const named = values.set ? { label_set: values.set } : { labels: values.labels };
  return { image: current.base64, ...named, encoder, defence: values.defence };
}

/** Why nothing can be asked yet, or "". */
function lacking(values) {
  if (!current) return "Choose a picture.";
  if (!values.set && values.labels.length === 0) return "Write at least one label.";
  if (values.encoders.length === 0) return "Choose at least one encoder.";
  return "";
}

/** Classify, and not once more when the timer ends. */
function classifyNow() {
  clearTimeout(timer);
  timer = 0;
  classified = classify();
}

async function classify() {
  classifying?.abort();
  const control = (classifying = new AbortController());
  const values = controls.values();
  const reason = lacking(values);
  if (reason) {
    for (const card of cards.values()) card.bars.empty();
    return say(reason);
  }
  say("");
  await Promise.all(
    values.encoders.map(async (name) => {
      const card = cards.get(name);
      try {
        const answer = await api.classify({ ...decision(values, name), top_k: TOP_K }, control.signal);
        card.showScores(answer, values.truth);
      } catch (error) {
        if (error.name !== "AbortError") card.showError(error);
      }
    }),
  );
}

/** Attack the encoders one after the other: a probe's time is wall clock, so two at once would each search less. */
async function attack() {
  const values = controls.values();
  const reason = lacking(values);
  if (reason) return say(reason);
  stopAttack();
  const control = (attacking = new AbortController());
  const chosen = values.encoders.map((name) => cards.get(name));
  for (const card of chosen) card.reset(values.eps, "queued");
  showRunning(true);
  if (timer) classifyNow();
  await classified; // else the clean scores might come last
  for (const card of chosen) {
    if (control.signal.aborted) break;
    say(`Attacking ${card.model.name} …`);
    await attackOne(card, values, control.signal);
  }
  if (attacking !== control) return; // another attack, or another decision, has taken the page over
  attacking = null;
  showRunning(false);
  for (const card of chosen) if (card.run.state === "queued") card.receive("cancelled", {});
  say(control.signal.aborted ? "Cancelled." : chosen.map((card) => `${card.model.name}: ${card.outcome()}`).join(" "));
}

/** End the attack under way, if any: what it attacks is no longer what is shown. */
function stopAttack() {
  if (!attacking) return;
  attacking.abort();
  attacking = null;
  showRunning(false);
}

async function attackOne(card, values, signal) {
  const body = {
    ...decision(values, card.model.name),
    norm: "linf",
    max_eps: values.eps,
    effort: values.effort,
    artefacts: ["adversarial", "perturbation"],
    ...(values.truth ? { label: values.truth } : {}),
  };
  card.run.state = "running";
  card.show();
  try {
    const end = await runProbe(body, signal, (type, data) => card.receive(type, data));
    if (end === "cancelled" && attacking?.signal === signal) card.receive("cancelled", {});
  } catch (error) {
    return card.fail(error);
  }
  await askServed(card, values, signal);
}

/** Ask /classify itself for the picture that the attack found: what breaks is what is served. */
async function askServed(card, values, signal) {
  const { adversarial } = card.run;
  if (!adversarial) return;
  const asked = { ...decision(values, card.model.name), image: adversarial, top_k: TOP_K };
  const answer = await api.classify(asked, signal).catch(() => null);
  if (answer && !signal.aborted) card.showAttacked(answer);
}

/** Attack and Cancel are one place in the order of Tab: the focus goes with it. */
function showRunning(running) {
  const [shown, hidden] = running ? [byId("cancel"), byId("attack")] : [byId("attack"), byId("cancel")];
  const focused = document.activeElement === hidden;
  shown.hidden = false;
  hidden.hidden = true;
  if (focused) shown.focus();
  document.body.classList.toggle("running", running);
}

function say(text, value) {
  byId("status").textContent = text;
  return value;
}

function fault(error) {
  byId("fault").textContent = error.message;
  byId("fault").hidden = false;
}

function watchTheme() {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const name = () => {
    byId("theme").textContent = dark() ? "Light" : "Dark";
    byId("theme").setAttribute("aria-label", `Switch to the ${dark() ? "light" : "dark"} theme`);
  };
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try {
      localStorage.setItem("ironclip-theme", root.dataset.theme);
    } catch {
      // No storage allowed: the choice lasts as long as the page.
    }
    name();
  });
  system.addEventListener("change", name);
  name();
}

start().catch(fault);
