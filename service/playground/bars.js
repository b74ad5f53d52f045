// The scores of one encoder as bars: of the picture as it is and, after an attack, of the picture that fools it.

import { el } from "./dom.js";
import { budget, percent } from "./words.js";

const ROWS = 6;

/** The bars of one encoder; `element` is their root. */
export class Bars {
  constructor(name) {
    this.list = el("ol", { class: "bars", "aria-label": `Scores of ${name}` });
    this.key = el("p", { class: "bars-key" });
    this.notes = el("div", { class: "notes" });
    this.element = el("div", { class: "scores" }, this.list, this.key, this.notes);
  }

  /** An answer of /classify; `truth` is the label taken for true, if one is named. */
  show(answer, truth) {
    Object.assign(this, { clean: answer.predictions, truth });
    this.render(null);
    const warning = answer.domain?.warning;
    this.notes.replaceChildren(...(warning ? [el("p", { class: "warning" }, warning)] : []));
  }

  /** The answer of /classify for the picture that fools the encoder at this eps; `label` is the true one. */
  showAttacked(answer, eps, label) {
    this.render(answer.predictions);
    const sign = (kind) => el("span", { class: `sign ${kind}`, "aria-hidden": true });
    const said = answer.predictions[0]?.label;
    // A verdict must hold on the way on which answers are served; where it does not, that is said.
    const still = said === label ? `: still “${said}”` : "";
    const says = ` the adversarial picture at ${budget(eps)}, as /classify answers it${still}`;
    this.key.replaceChildren(sign("before"), " clean  ", sign("after"), says);
  }

  /** Only the clean picture's bars. */
  clear() {
    if (this.clean) this.render(null);
  }

  /** No bars, and why. */
  fail(problem) {
    this.empty();
    this.notes.replaceChildren(el("p", { class: "fault" }, problem.message));
  }

  /** No bars: nothing is asked. */
  empty() {
    this.clean = null;
    for (const part of [this.list, this.key, this.notes]) part.replaceChildren();
  }

  render(attacked) {
    const after = new Map((attacked ?? []).map((one) => [one.label, one.score]));
    const rows = this.clean.slice(0, ROWS);
    const said = attacked?.[0];
    if (said && !rows.some((row) => row.label === said.label)) {
      // What it says now has to be seen, even where it was far behind.
      const before = this.clean.find((one) => one.label === said.label) ?? { label: said.label, score: null };
      rows.splice(ROWS - 1, 1, before);
    }
    const first = (said ?? rows[0])?.label;
    this.list.classList.toggle("attacked", attacked !== null);
    this.list.replaceChildren(...rows.map((row) => this.row(row, after.get(row.label), first, attacked)));
    this.key.replaceChildren();
  }

  /** One label; a score of null or undefined was not among those that the answer lists. */
  row({ label, score }, after, first, attacked) {
    const tag = label === this.truth ? el("span", { class: "tag" }, "true") : null;
    const bar = el("span", { class: "bar", "aria-hidden": true }, fill(score, "before"), attacked && fill(after, "after"));
    return el(
      "li",
      { class: label === first ? "first" : null },
      el("span", { class: "name" }, el("span", {}, label), tag),
      bar,
      el("span", { class: "number" }, percent(score)),
      attacked && el("span", { class: "number after" }, el("span", { class: "unseen" }, "attacked: "), percent(after)),
    );
  }
}

function fill(score, kind) {
  const part = el("span", { class: `fill ${kind}` });
  part.style.width = `${100 * (score ?? 0)}%`;
  return part;
}
