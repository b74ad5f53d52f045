// The picture that is asked about: a sample, a chosen file, one dropped on the page, or one pasted.

import * as api from "./api.js";
import { byId, el } from "./dom.js";

/**
 * Watches the ways in which a picture comes, and holds the current one.
 *
 * onChange: called with {base64, image, sample (or null)} whenever there is another.
 * onFault: called with an Error when one cannot be shown or loaded.
 */
export class Picture {
  constructor(samples, onChange, onFault) {
    this.samples = samples;
    this.onChange = onChange;
    this.onFault = onFault;
    this.turn = 0;
    this.url = null;
    this.build();
  }

  build() {
    byId("samples").replaceChildren(
      ...this.samples.map((sample) => {
        const input = el("input", { type: "radio", name: "sample", value: sample.name });
        input.addEventListener("change", () => this.take(sample));
        const image = el("img", { src: api.local(sample.url), alt: sample.label, title: sample.label, loading: "lazy" });
        return el("label", { class: "sample" }, input, image);
      }),
    );
    byId("file").addEventListener("change", (event) => this.takeFile(event.target.files[0]));
    addEventListener("paste", (event) => this.takeFile(event.clipboardData?.files[0]));
    this.watchDrops();
  }

  watchDrops() {
    const zone = byId("drop");
    const files = (event) => event.dataTransfer?.types.includes("Files");
    addEventListener("dragover", (event) => {
      if (!files(event)) return;
      event.preventDefault(); // else the browser would leave the page to show the file
      zone.classList.add("over");
    });
    addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) zone.classList.remove("over");
    });
    addEventListener("drop", (event) => {
      if (!files(event)) return;
      event.preventDefault();
      zone.classList.remove("over");
      this.takeFile(event.dataTransfer.files[0]);
    });
  }

  /** Take the sample of this name; false if there is none. */
  takeNamed(name) {
    const sample = this.samples.find((one) => one.name === name);
    if (sample) this.take(sample);
    return Boolean(sample);
  }

  async take(sample) {
    const turn = ++this.turn;
    try {
      await this.show(await api.file(sample.url), sample, turn);
    } catch (error) {
      this.onFault(error);
    }
  }

  async takeFile(file) {
    if (!file) return;
    await this.show(file, null, ++this.turn);
    byId("file").value = ""; // so that the same file can be chosen again
  }

  async show(blob, sample, turn) {
    const base64 = await toBase64(blob);
    const url = URL.createObjectURL(blob);
    const image = new Image();
    image.src = url;
    // What the browser cannot decode may still be one for the service, whose answer then says what is wrong with it.
    const decoded = await image.decode().then(
      () => image,
      () => null,
    );
    if (turn !== this.turn) return URL.revokeObjectURL(url); // another picture came meanwhile
    if (this.url) URL.revokeObjectURL(this.url);
    this.url = url;
    this.preview(url, decoded, sample, blob);
    this.onChange({ base64, image: decoded, sample });
  }

  preview(url, image, sample, blob) {
    const preview = byId("preview");
    preview.hidden = !image;
    preview.src = url;
    preview.alt = sample ? sample.label : "Your picture";
    const named = sample ? `${sample.credit}, ${sample.licence}` : `${blob.name || "Pasted picture"}: your own`;
    byId("credit").textContent = sample ? `Sample “${sample.label}”: ${named}` : named;
    for (const input of document.querySelectorAll("input[name=sample]")) input.checked = input.value === sample?.name;
  }
}

function toBase64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
