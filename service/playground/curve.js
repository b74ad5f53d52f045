// The curve of one probe: the true label's score against eps. Drawn anew from the data each time; it is small.

import { svg } from "./dom.js";
import { budget, percent, trim, undecided } from "./words.js";

const HEIGHT = 216;
const MARGIN = { top: 22, right: 14, bottom: 36, left: 46 };
const STEPS = [1, 2, 4, 5, 8];
const MOST_TICKS = 9;
const DASHES = ["– –", "· · ·", "–––"]; // as the style draws ghost-0, ghost-1, ghost-2

/**
 * Draw into an <svg>.
 *
 * data: {maxEps, clean (score at eps 0, or null), points, robustTo, brokenAt, latest (eps of the newest point),
 *        others: [{name, clean, points}], name}
 */
export function drawCurve(element, data) {
  const width = Math.max(220, Math.round(element.clientWidth || 360));
  const plot = {
    width,
    x: (eps) => MARGIN.left + (eps / data.maxEps) * (width - MARGIN.left - MARGIN.right),
    y: (score) => HEIGHT - MARGIN.bottom - score * (HEIGHT - MARGIN.top - MARGIN.bottom),
    maxEps: data.maxEps,
  };
  element.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  element.setAttribute("aria-label", describe(data));
  element.replaceChildren(
    ...zones(plot, data),
    ...axes(plot),
    ...others(plot, data.others ?? []),
    ...line(plot, data, "line"),
    ...markers(plot, data),
  );
  element.dataset.redraws = Number(element.dataset.redraws ?? 0) + 1;
  element.dataset.points = data.points.length;
}

/** The points of a curve from eps 0 on, as far as the axis goes; a radius without a score so far has none. */
function path(data, maxEps) {
  const start = { eps: 0, score_of_label: data.clean ?? null };
  const points = data.points.filter((point) => point.eps > 0 && point.eps <= maxEps);
  return [start, ...points].filter((point) => Number.isFinite(point.score_of_label));
}

function zones(plot, { robustTo, brokenAt, points }) {
  const top = plot.y(1);
  const zone = (from, to, kind) =>
    svg("rect", {
      class: `zone ${kind}`,
      x: plot.x(from),
      y: top,
      width: Math.max(0, plot.x(Math.min(to, plot.maxEps)) - plot.x(from)),
      height: plot.y(0) - top,
    });
  const edge = (eps, kind) =>
    svg("line", { class: `edge ${kind}`, x1: plot.x(eps), x2: plot.x(eps), y1: top, y2: plot.y(0) });
  if (!points.length) return [];
  const parts = [];
  const held = robustTo ?? 0;
  const broken = brokenAt ?? null;
  if (held > 0) parts.push(zone(0, held, "held"));
  if (broken !== null) {
    parts.push(zone(held, broken, "between"));
    if (broken <= plot.maxEps) parts.push(edge(broken, "broken"));
  }
  return parts;
}

function axes(plot) {
  const parts = [];
  for (const score of [0, 0.25, 0.5, 0.75, 1]) {
    const y = plot.y(score);
    const kind = score === 0 ? "axis" : "grid";
    parts.push(svg("line", { class: kind, x1: plot.x(0), x2: plot.x(plot.maxEps), y1: y, y2: y }));
    if ((score * 4) % 2 === 0) {
      parts.push(svg("text", { class: "tick", x: MARGIN.left - 8, y: y + 4, "text-anchor": "end" }, `${100 * score} %`));
    }
  }
  const step = STEPS.find((one) => plot.maxEps / one < MOST_TICKS) ?? 16;
  for (let eps = 0; eps <= plot.maxEps; eps += step) {
    const x = plot.x(eps);
    parts.push(svg("line", { class: "axis", x1: x, x2: x, y1: plot.y(0), y2: plot.y(0) + 4 }));
    parts.push(svg("text", { class: "tick", x, y: plot.y(0) + 17, "text-anchor": "middle" }, trim(eps)));
  }
  parts.push(svg("text", { class: "name", x: 2, y: 11 }, "score of the true label"));
  const unit = svg("text", { class: "name", x: plot.x(plot.maxEps), y: HEIGHT - 3, "text-anchor": "end" });
  unit.append(svg("tspan", { "font-style": "italic" }, "eps"), " in 1/255");
  parts.push(unit);
  return parts;
}

function line(plot, data, kind) {
  const points = path(data, plot.maxEps);
  if (points.length < 2) return [];
  const d = points.map((point, i) => `${i ? "L" : "M"}${plot.x(point.eps)} ${plot.y(point.score_of_label)}`).join("");
  return [svg("path", { class: kind, d })];
}

/** Which dashes stand for which of the other encoders. */
export function keyOf(list) {
  return list.map((one, i) => `${DASHES[i % DASHES.length]} ${one.name}`).join("\u2003");
}

/** The other encoders' curves, so that two can be compared in one place. */
function others(plot, list) {
  return list.flatMap((one, i) => line(plot, one, `ghost ghost-${i % DASHES.length}`));
}

function markers(plot, data) {
  return path(data, plot.maxEps).map((point) => {
    const x = plot.x(point.eps);
    const y = plot.y(point.score_of_label);
    const state = point.broken ? "broken" : undecided(point) ? "open" : "held";
    const kind = `point ${state}${point.eps === data.latest ? " latest" : ""}`;
    const shape = point.broken
      ? svg("path", { class: kind, d: `M${x} ${y - 6}L${x + 6} ${y}L${x} ${y + 6}L${x - 6} ${y}Z` })
      : svg("circle", { class: kind, cx: x, cy: y, r: 4 });
    const said = point.eps === 0 ? "the picture as it is" : budget(point.eps);
    const fooled = point.broken && point.label ? `, says ${point.label}` : "";
    const open = state === "open" ? ", not decided" : "";
    shape.append(svg("title", {}, `${said}: ${percent(point.score_of_label)}${fooled}${open}`));
    return shape;
  });
}

function describe({ name, maxEps, points, robustTo, brokenAt }) {
  const axis = `Curve of ${name}: score of the true label for eps from 0 to ${budget(maxEps)}.`;
  if (!points.length) return `${axis} No attack yet.`;
  const end = brokenAt === null || brokenAt === undefined ? "not fooled so far" : `fooled at ${budget(brokenAt)}`;
  const open = points.filter(undecided).length;
  const count = `${points.length} points${open ? ` (${open} not decided)` : ""}`;
  return `${axis} ${count}; held up to ${budget(robustTo ?? 0)}, ${end}.`;
}
