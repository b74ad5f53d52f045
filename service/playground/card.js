// One encoder's column: its scores, and its probe as it runs.

import { Bars } from "./bars.js";
import { drawCurve, keyOf } from "./curve.js";
import { el, svg } from "./dom.js";
import { Figures } from "./figures.js";
import { FIRST_EPS } from "./state.js";
import { count, percent, reading, standing, trim, undecided, verdict } from "./words.js";

const EMPTY = { clean: null, label: null, points: [], robustTo: null, brokenAt: null, latest: null, status: null };

/** The column of one encoder; `element` is its root. */
export class Card {
  constructor(model, peers) {
    this.model = model;
    this.peers = peers; // all cards' curves, this one's among them: () => [Card]
    this.maxEps = FIRST_EPS;
    this.run = { ...EMPTY, state: "idle" };
    this.build();
  }

  build() {
    const known = standing(this.model);
    const id = `card-${this.model.name}`;
    this.bars = new Bars(this.model.name);
    this.reading = el("p", { class: "reading" });
    this.verdict = el("p", { class: "verdict" });
    this.curve = svg("svg", { class: "curve", role: "img" });
    this.others = el("p", { class: "note others" });
    this.figures = new Figures(this.model);
    this.cost = el("p", { class: "cost" });
    this.warnings = el("div", { class: "notes" });
    this.numbers = el("tbody");
    const head = ["eps", "says", "score", "true label", "steps"].map((name) => el("th", { scope: "col" }, name));
    const table = el("table", {}, el("thead", {}, el("tr", {}, ...head)), this.numbers);
    this.details = el("details", { hidden: true }, el("summary", {}, "Numbers"), table);
    const badge = el("p", { class: `badge${known.robust ? " robust" : ""}` }, known.badge);
    const about = [`${this.model.resolution} px`, `${this.model.head} head`, this.model.dtype].join(" · ");
    const result = el("div", { class: "result" }, this.reading, this.verdict);
    const measured = known.measured ? el("p", { class: "note" }, known.measured) : null;
    this.element = el(
      "article",
      { class: "card", "aria-labelledby": id },
      el("header", {}, el("h2", { id }, this.model.name), badge, el("p", { class: "about" }, about)),
      this.bars.element,
      el("section", { class: "probe", "aria-label": `Attack on ${this.model.name}` }, result, this.curve, this.others),
      this.figures.element,
      el("footer", {}, this.warnings, this.cost, this.details, measured),
    );
    new ResizeObserver(() => this.draw()).observe(this.curve);
    this.show();
  }

  /** The bars of an answer of /classify; `truth` is the label taken for true, if one is named. */
  showScores(answer, truth) {
    this.bars.show(answer, truth);
    this.run.first = answer.predictions[0];
    const known = truth ? answer.predictions.find((one) => one.label === truth) : answer.predictions[0];
    this.cleanScore = known?.score ?? null;
    this.figures.showClean(this.run.first);
    this.draw();
  }

  /** Why there are no bars. */
  showError(problem) {
    this.bars.fail(problem);
  }

  /** What /classify says to the picture that fools the encoder: bars beside those of the clean one. */
  showAttacked(answer) {
    this.bars.showAttacked(answer, this.run.brokenAt, this.run.label);
  }

  /** Back to how it was before any attack; `maxEps` is the axis. */
  reset(maxEps, state = "idle") {
    this.maxEps = maxEps;
    this.run = { ...EMPTY, first: this.run.first, state };
    this.bars.clear();
    this.figures.clear();
    this.warnings.replaceChildren();
    this.show();
  }

  /** One event of the stream. */
  receive(type, data) {
    const run = this.run;
    if (type === "started") {
      Object.assign(run, { state: "running", clean: data.clean, label: data.label });
      this.cleanScore = scoreOf(data.clean, data.label) ?? this.cleanScore;
    } else if (type === "point") {
      run.points = [...run.points.filter((one) => one.eps !== data.eps), data].sort((a, b) => a.eps - b.eps);
      run.latest = data.eps;
    } else if (type === "progress") {
      Object.assign(run, { robustTo: data.robust_to, brokenAt: data.broken_at });
      run.cost = { gradients: data.gradients, seconds: data.elapsed };
    } else if (type === "artefacts") {
      this.figures.showAttack(data, data.eps, run.points);
    } else if (type === "done") {
      this.finish(data);
    } else if (type === "cancelled") {
      run.state = "cancelled";
    }
    this.show();
    for (const peer of this.peers()) if (peer !== this) peer.draw();
  }

  finish(answer) {
    const { clean, label, points, robust_to: robustTo, broken_at: brokenAt, status, cost, statement } = answer;
    Object.assign(this.run, { clean, label, points, robustTo, brokenAt, status, cost, statement });
    Object.assign(this.run, { state: "done", latest: null, attack: answer.attack });
    this.cleanScore = scoreOf(clean, label) ?? this.cleanScore;
    this.run.adversarial = answer.artefacts?.adversarial ?? null;
    if (this.run.adversarial) this.figures.showAttack(answer.artefacts, brokenAt, points);
    const notes = (answer.warnings ?? []).map((one) => el("p", { class: "warning" }, one.detail ?? String(one)));
    if (status === "budget_exhausted") {
      notes.unshift(el("p", { class: "warning" }, "The time ran out before the search ended; more effort may find less."));
    }
    this.warnings.replaceChildren(...notes);
  }

  /** The probe ended without an answer. */
  fail(problem) {
    Object.assign(this.run, { state: "failed", fault: problem.message });
    this.show();
  }

  /** How the attack ended, for a reader who does not see the column. */
  outcome() {
    return this.run.state === "failed" ? this.run.fault : `${this.verdict.textContent}.`;
  }

  words() {
    const { state, points, fault } = this.run;
    if (state === "idle") return "Not attacked yet";
    if (state === "queued") return "Waits for its turn";
    if (state === "failed") return fault;
    const found = state === "cancelled" && !points.length ? "" : verdict({ ...this.run, maxEps: this.maxEps });
    return state === "cancelled" ? ["Cancelled", found].filter(Boolean).join(". ") : found;
  }

  show() {
    const { run } = this;
    this.element.dataset.state = run.state;
    const { text, kind } = reading(run);
    this.reading.replaceChildren(...(kind ? [text, el("span", {}, "/255")] : []));
    this.reading.className = `reading ${kind}`;
    this.verdict.textContent = this.words();
    this.verdict.className = run.state === "failed" ? "verdict fault" : "verdict";
    this.cost.textContent = this.costLine();
    this.numbers.replaceChildren(...run.points.map(numbersRow));
    this.details.hidden = run.points.length === 0;
    this.draw();
  }

  costLine() {
    const { cost, attack, statement, state } = this.run;
    if (!cost) return "";
    const parts = [attack?.name, count(cost.gradients, "gradient"), `${Number(cost.seconds).toFixed(1)} s`];
    const line = parts.filter(Boolean).join(" · ");
    return statement && state === "done" ? `${line}. ${statement}` : line;
  }

  draw() {
    const others = this.peers()
      .filter((peer) => peer !== this && peer.run.points.length)
      .map((peer) => ({ name: peer.model.name, clean: peer.cleanScore, points: peer.run.points }));
    this.others.textContent = others.length ? `For comparison: ${keyOf(others)}` : "";
    const { points, robustTo, brokenAt, latest } = this.run;
    const clean = this.cleanScore ?? null;
    const { maxEps } = this;
    drawCurve(this.curve, { maxEps, clean, points, robustTo, brokenAt, latest, others, name: this.model.name });
  }
}

function scoreOf(clean, label) {
  if (!clean) return null;
  if (clean.label === label) return clean.score;
  return clean.predictions?.find((one) => one.label === label)?.score ?? null;
}

function numbersRow(point) {
  // What an attack that still runs, or was cut short, has come to so far is no answer.
  const says = undecided(point) ? ["not decided", percent(null)] : [point.label ?? "–", percent(point.score)];
  const cells = [trim(point.eps), ...says, percent(point.score_of_label), point.steps ?? ""];
  return el("tr", { class: point.broken ? "broken" : null }, ...cells.map((text) => el("td", {}, String(text))));
}
