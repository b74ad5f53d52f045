// Three pictures side by side: clean, adversarial, and the difference between them.

import { el } from "./dom.js";
import { budget, percent } from "./words.js";

/** The pictures of one encoder's probe; `element` is their root. */
export class Figures {
  constructor(model) {
    this.model = model;
    this.clean = figure("clean", el("canvas", { width: model.resolution, height: model.resolution }));
    this.adversarial = figure("adversarial", el("img", { alt: "" }));
    this.perturbation = figure("difference", el("img", { alt: "" }));
    const parts = [this.clean, this.adversarial, this.perturbation].map((one) => one.element);
    this.element = el("div", { class: "figures" }, ...parts);
    this.clear();
  }

  /** The clean picture, scaled about as the encoder scales it: beside an adversarial one of 64 px it would flatter. */
  drawClean(image) {
    const canvas = this.clean.media;
    const side = canvas.width;
    const context = canvas.getContext("2d");
    const { resize_mode: mode, background } = this.model.preprocessing ?? {};
    context.fillStyle = `rgb(${(background ?? [255, 255, 255]).join(" ")})`;
    context.fillRect(0, 0, side, side);
    if (!image) return this.clean.element.classList.add("empty");
    const { naturalWidth: width, naturalHeight: height } = image;
    const scale = mode === "longest" ? side / Math.max(width, height) : side / Math.min(width, height);
    const [w, h] = mode === "squash" ? [side, side] : [width * scale, height * scale];
    context.imageSmoothingQuality = "high";
    context.drawImage(image, (side - w) / 2, (side - h) / 2, w, h);
    this.clean.element.classList.remove("empty");
  }

  /** What the clean picture is taken for. */
  showClean(prediction) {
    this.clean.caption.textContent = prediction ? `${prediction.label} ${percent(prediction.score)}` : "";
  }

  /** The pictures of the smallest budget that fooled the encoder. */
  showAttack({ adversarial, perturbation }, eps, points) {
    const point = points.find((one) => one.eps === eps);
    const said = point ? `${point.label} ${percent(point.score)}` : "";
    put(this.adversarial, adversarial, said, `The picture that fools ${this.model.name}`);
    put(this.perturbation, perturbation, `within ${budget(eps)}, amplified`, "What was changed, amplified");
  }

  clear() {
    for (const one of [this.adversarial, this.perturbation]) put(one, null, "", "");
  }
}

function figure(title, media) {
  const caption = el("span", { class: "said" });
  const frame = el("div", { class: "frame" }, media);
  const element = el("figure", {}, frame, el("figcaption", {}, el("span", { class: "title" }, title), caption));
  return { element, media, caption };
}

function put(part, source, caption, alt) {
  const shown = typeof source === "string" && source.startsWith("data:image/");
  part.media.hidden = !shown;
  if (shown) part.media.src = source;
  else part.media.removeAttribute("src");
  part.media.alt = alt;
  part.caption.textContent = shown ? caption : "";
  part.element.classList.toggle("empty", !shown);
}
