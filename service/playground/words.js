// What the page says in words: numbers, verdicts, and what is known of an encoder.

/** A score as percent, a dash if there is none; what rounds to 0 or 100 and is not says so. */
export function percent(score) {
  if (score === null || score === undefined) return "–";
  if (score > 0 && score < 0.0005) return "<0.1\u202f%";
  if (score < 1 && score >= 0.9995) return ">99.9\u202f%";
  return `${(100 * score).toFixed(1)}\u202f%`;
}

/** A budget in steps of 1/255. */
export function budget(eps) {
  return `${trim(eps)}/255`;
}

/** A number with three digits at most after the point, and no zeros at its end. */
export function trim(number) {
  return String(Number(Number(number).toFixed(3)));
}

/** "1 gradient", "12 gradients", "1,200 gradients". */
export function count(number, noun) {
  return `${Math.round(number).toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

/** Whether a radius is neither held nor broken: its attack runs, waits, or was cut short. */
export function undecided(point) {
  return point.state === "waiting" || point.state === "running" || point.state === "unknown";
}

/**
 * The outcome of a probe in one plain sentence.
 *
 * run: {clean, label, points (sorted by eps), robustTo, brokenAt, maxEps, state, status}
 */
export function verdict(run) {
  const named = (label) => (label ? `: says “${label}”` : "");
  if (run.clean?.correct === false || run.brokenAt === 0) {
    return `Wrong without any attack${named(run.clean?.label)}`;
  }
  if (run.brokenAt !== null && run.brokenAt !== undefined) {
    const point = run.points.find((one) => one.eps === run.brokenAt);
    if (run.state === "running") return `Fooled at ${budget(run.brokenAt)}${named(point?.label)}; searching on`;
    const held = run.robustTo > 0 ? `; held up to ${budget(run.robustTo)}` : "";
    return `Fooled at ${budget(run.brokenAt)}${named(point?.label)}${held}`;
  }
  const reached = run.robustTo ?? 0;
  if (run.state === "done" && run.status !== "budget_exhausted") return `Held up to ${budget(reached || run.maxEps)}`;
  if (reached > 0) return `Held up to ${budget(reached)} so far`;
  return run.state === "running" ? "Searching" : "Nothing found before it ended";
}

/** The one number of a probe, as {text, kind}: the smallest budget known to fool, or one that did not; "" before either. */
export function reading(run) {
  if (run.clean?.correct === false || run.brokenAt === 0) return { text: "0", kind: "broken" };
  if (run.brokenAt !== null && run.brokenAt !== undefined) return { text: trim(run.brokenAt), kind: "broken" };
  if (run.robustTo > 0) return { text: `>\u2009${trim(run.robustTo)}`, kind: "held" };
  return { text: "", kind: "" };
}

/** What is known of an encoder's training: {robust: true | false | null, badge, measured}. */
export function standing(model) {
  const known = model.provenance ?? {};
  const threat = known.threat_model?.label;
  if (threat) return { robust: true, badge: `robust · ${known.method} at ${threat}`, measured: measured(known, threat) };
  if (known.method) return { robust: false, badge: "not trained against attacks", measured: "" };
  return { robust: null, badge: "robustness not known", measured: "" };
}

function measured(known, threat) {
  const row = (known.robustness ?? []).find(
    (one) => one.threat === threat && one.level === "" && one.attack.startsWith("autoattack"),
  );
  if (!row) return "";
  return (
    `Measured on ${row.pictures} pictures of ${row.sample}: ${row.robust} % right under ${row.attack} at ${threat}, ` +
    `${row.clean} % without.`
  );
}
