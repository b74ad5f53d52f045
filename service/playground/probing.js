// One probe from its start to its end: events as they stream in, and one way out for whatever goes wrong.

import * as api from "./api.js";

const TYPES = ["started", "point", "progress", "artefacts", "done", "failed", "cancelled"];
// A stream that breaks is taken up again behind its last event; this often without any event in between, and it is given
// up.
const MOST_BREAKS = 4;

/**
 * Run a probe and pass on its events.
 *
 * body: what POST /attack-probe takes; signal: aborts, and cancels the probe in the service;
 * onEvent: called with (type, data) for each event but `failed`.
 *
 * Resolves with "done" or "cancelled"; rejects with a Problem.
 */
export async function runProbe(body, signal, onEvent) {
  const starting = api.startProbe(body);
  const aborted = new Promise((resolve) => signal.addEventListener("abort", () => resolve(null), { once: true }));
  let started;
  try {
    started = await Promise.race([starting, aborted]);
  } catch (error) {
    throw explained(error);
  }
  if (started === null || signal.aborted) {
    // The request is not broken off: its answer says which probe there is to cancel.
    starting.then(({ id }) => id && api.cancelProbe(id)).catch(() => {});
    return "cancelled";
  }
  if (started.answer) {
    onEvent("done", started.answer);
    return "done";
  }
  return follow(started, signal, onEvent);
}

function follow({ id, events }, signal, onEvent) {
  return new Promise((resolve, reject) => {
    const source = api.events(events);
    let breaks = 0;

    const finish = (settle, value) => {
      source.close();
      signal.removeEventListener("abort", cancel);
      settle(value);
    };
    const cancel = () => {
      api.cancelProbe(id);
      finish(resolve, "cancelled");
    };
    const receive = (type, data) => {
      breaks = 0;
      if (type === "failed") return finish(reject, api.Problem.from(data.error));
      onEvent(type, data);
      if (type === "done" || type === "cancelled") finish(resolve, type);
    };

    signal.addEventListener("abort", cancel);
    if (signal.aborted) return cancel();
    for (const type of TYPES) {
      source.addEventListener(type, (event) => {
        try {
          receive(type, JSON.parse(event.data));
        } catch (error) {
          finish(reject, error);
        }
      });
    }
    source.onerror = () => {
      breaks += 1;
      if (source.readyState !== EventSource.CLOSED && breaks < MOST_BREAKS) return;
      source.close();
      // The stream is lost; what became of the probe can still be asked.
      lastWord(id, onEvent).then(
        (end) => finish(resolve, end),
        (error) => finish(reject, error),
      );
    };
  });
}

async function lastWord(id, onEvent) {
  const state = await api.probe(id).catch((error) => {
    api.cancelProbe(id);
    throw error;
  });
  if (state.result) {
    onEvent("done", state.result);
    return "done";
  }
  if (state.error) throw api.Problem.from(state.error);
  if (state.status === "cancelled") return "cancelled";
  api.cancelProbe(id); // nobody follows it any more: it would only keep its place and its points
  throw new api.Problem(0, "", "The stream of events broke off, and the probe has not ended. Attack again.");
}

function explained(error) {
  const absent = error.status === 404 && (error.code === "route-not-found" || error.code === "");
  return absent ? new api.Problem(404, error.code, "This service has probing switched off.") : error;
}
