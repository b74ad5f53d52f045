// The service's routes. Every path is relative, so that the page works behind a path prefix.

import { askForKey, current, keyHeaders } from "./key.js";
import { KeyedEventSource } from "./stream.js";

/** An error the service explained (RFC 9457), or one on the way to it. */
export class Problem extends Error {
  constructor(status, code, detail) {
    super(detail);
    this.status = status;
    this.code = code;
  }

  /** From a problem as the service writes it. */
  static from(body, status = 0) {
    const text = body?.detail || body?.title || `The service answered ${status} and did not say why.`;
    return new Problem(body?.status ?? status, body?.code ?? "", text);
  }
}

/** A path of the service's ("/probes/7") below this page; anything else ("//elsewhere", "https:") is refused. */
export function local(path) {
  const url = new URL(String(path).replace(/^\/(?!\/)/, ""), document.baseURI);
  if (url.origin !== location.origin) throw new Problem(0, "", "The service named an address that is not its own.");
  return url.href;
}

/** Ask and return {status, body}; throws a Problem for everything that is not an answer. Asks for a key if it has to. */
async function ask(path, options = {}) {
  for (;;) {
    const sent = current();
    try {
      return await askOnce(path, options);
    } catch (error) {
      if (error.status !== 401 || options.keepalive) throw error;
      // Another request may have been given a key since this one was sent.
      if (current() === sent && !(await askForKey(error.message))) throw error;
      options.signal?.throwIfAborted();
    }
  }
}

async function askOnce(path, options) {
  let response;
  try {
    const headers = { Accept: "application/json", ...keyHeaders(), ...options.headers };
    response = await fetch(local(path), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Problem) throw error;
    throw new Problem(0, "", "The service cannot be reached. Is it still running?");
  }
  if (response.status === 204) return { status: 204, body: null };
  const body = await response.json().catch(() => null);
  options.signal?.throwIfAborted();
  if (!response.ok || body === null) throw Problem.from(body, response.status);
  return { status: response.status, body };
}

async function read(path) {
  return (await ask(path)).body;
}

export const models = () => read("models");
export const labelSets = async () => (await read("label-sets")).label_sets;
export const samples = async () => (await read("samples")).samples;

/** The names of a registered label set. */
export async function labelsOf(name) {
  const stored = await read(`label-sets/${encodeURIComponent(name)}`);
  return stored.labels.map((label) => (typeof label === "string" ? label : label.name));
}

/** A file of the service's, as a Blob. */
export async function file(path) {
  const response = await fetch(local(path)).catch(() => null);
  if (!response?.ok) throw new Problem(response?.status ?? 0, "", "The sample picture cannot be loaded.");
  return response.blob();
}

function post(path, body, signal, headers = {}) {
  const text = JSON.stringify(body);
  return ask(path, { method: "POST", body: text, signal, headers: { "Content-Type": "application/json", ...headers } });
}

export async function classify(body, signal) {
  return (await post("classify", body, signal)).body;
}

/** Start a probe: {id, events} where it runs on in the service, {answer} where it answered at once. */
export async function startProbe(body) {
  const { status, body: answer } = await post("attack-probe", body, undefined, { Prefer: "respond-async" });
  return status === 202 ? answer : { answer };
}

/** The events of a probe, from a path of the service's. */
export function events(path) {
  return current() ? new KeyedEventSource(local(path), keyHeaders()) : new EventSource(local(path));
}

export const probe = (id) => read(`probes/${encodeURIComponent(id)}`);

/** Cancel a probe. That it had ended already, or cannot be reached, changes nothing here. */
export async function cancelProbe(id) {
  await ask(`probes/${encodeURIComponent(id)}`, { method: "DELETE", keepalive: true }).catch(() => {});
}
