// The form: what is asked of the service, filled from what the service offers.

import * as api from "./api.js";
import { byId, el } from "./dom.js";
import { FIRST_EPS, FIRST_SET, parseLabels } from "./state.js";
import { budget, standing } from "./words.js";

const MOST_DATALIST = 500;

/**
 * The form's fields.
 *
 * offer: {models, defaultName, defences, labelSets, labels (those to begin with)}
 * onChange: called with "decision" when what is decided changes, with "attack" when only the attack does.
 */
export class Controls {
  constructor(offer, onChange) {
    this.offer = offer;
    this.onChange = onChange;
    this.names = [];
    this.fill();
    this.watch();
  }

  fill() {
    const { models, labelSets, defences } = this.offer;
    byId("label-set").append(...labelSets.map(({ name }) => el("option", { value: name }, `label set “${name}”`)));
    byId("defence").replaceChildren(...defences.map((name) => el("option", { value: name }, name)));
    byId("encoders").replaceChildren(
      ...models.map((model) => {
        const { robust } = standing(model);
        const input = el("input", { type: "checkbox", name: "encoder", value: model.name });
        const tag = robust ? el("span", { class: "tag robust" }, "robust") : null;
        return el("label", { class: "encoder" }, input, el("span", {}, model.name), tag);
      }),
    );
  }

  watch() {
    byId("labels").addEventListener("input", () => this.relabel());
    byId("label-set").addEventListener("change", () => this.relabel());
    byId("truth").addEventListener("change", () => this.onChange("decision"));
    byId("defence").addEventListener("change", () => this.onChange("decision"));
    byId("encoders").addEventListener("change", () => this.onChange("decision"));
    byId("effort").addEventListener("change", () => this.onChange("attack"));
    byId("max-eps").addEventListener("input", () => {
      this.showEps();
      this.onChange("attack");
    });
  }

  /** Put a state (as in the page's address) into the fields; what it does not say gets its default. */
  async set(state) {
    byId("labels").value = (state.labels ?? this.offer.labels).join(", ");
    // Many labels are the harder question: a list of a few is left only by a large change.
    const whole = this.offer.labelSets.some(({ name }) => name === FIRST_SET) ? FIRST_SET : "";
    choose("label-set", state.set ?? (state.labels ? "" : whole));
    choose("defence", state.defence ?? "none");
    choose("effort", state.effort ?? "quick");
    byId("truth").value = state.truth ?? "";
    byId("max-eps").value = state.eps ?? FIRST_EPS;
    this.showEps();
    const { models, defaultName } = this.offer;
    const known = (state.encoders ?? []).filter((name) => models.some((model) => model.name === name));
    const chosen = known.length ? known : [defaultName, "demo-robust"];
    for (const box of this.boxes()) box.checked = chosen.includes(box.value);
    await this.readNames();
  }

  /** The labels have changed: a true label that is no longer among them goes. */
  async relabel() {
    await this.readNames();
    const truth = byId("truth");
    if (truth.value && this.names.length && !this.names.includes(truth.value)) truth.value = "";
    this.onChange("decision");
  }

  async readNames() {
    const set = byId("label-set").value;
    byId("labels-field").hidden = set !== "";
    // A set that cannot be read is told by the answer to the next classification.
    const names = set ? await api.labelsOf(set).catch(() => []) : parseLabels(byId("labels").value);
    if (set !== byId("label-set").value) return;
    this.names = names;
    const listed = names.slice(0, MOST_DATALIST).map((name) => el("option", { value: name }));
    byId("truth-names").replaceChildren(...listed);
  }

  /** A sample says what it shows; a picture of the visitor's own does not. */
  suggestTruth(label) {
    byId("truth").value = label && this.names.includes(label) ? label : "";
  }

  boxes() {
    return [...document.querySelectorAll("input[name=encoder]")];
  }

  showEps() {
    byId("max-eps-shown").value = budget(byId("max-eps").value);
  }

  /** What the fields say. */
  values() {
    return {
      labels: parseLabels(byId("labels").value),
      set: byId("label-set").value || undefined,
      truth: byId("truth").value.trim() || undefined,
      encoders: this.boxes().filter((box) => box.checked).map((box) => box.value),
      defence: byId("defence").value,
      effort: byId("effort").value,
      eps: Number(byId("max-eps").value),
    };
  }
}

/** Choose an option of a select if it is there, else leave the first. */
function choose(id, value) {
  const select = byId(id);
  const there = [...select.options].some((option) => option.value === value);
  select.value = there ? value : select.options[0].value;
}
