// A load of streams, with k6: every one must begin, be whole, and end.
//   k6 run -e ADDRESS=host:port -e PROTOS=folder stream_load.js

import { check } from "k6";
import { Counter } from "k6/metrics";
import { Client, Stream } from "k6/net/grpc";

const TOKENS = 32;
const whole = new Counter("whole_streams");
const client = new Client();
client.load([__ENV.PROTOS], "mili/v1/inference.proto");

export const options = {
  scenarios: { streams: { executor: "shared-iterations", vus: 8, iterations: 40 } },
  thresholds: { checks: ["rate==1"], whole_streams: ["count==40"] },
};

export default function () {
  client.connect(__ENV.ADDRESS, { plaintext: true });
  const stream = new Stream(client, "mili.v1.InferenceService/GenerateStream");
  let tokens = 0;
  let events = 0;
  stream.on("data", ({ event }) => {
    events += 1;
    check(event, { "events are numbered": (e) => Number(e.sequence) === events });
    if (event.delta) tokens += event.delta.numTokens;
    if (event.finished) {
      const reason = event.finished.finishReason;
      check(reason, { "ended by max_tokens": (r) => r === "FINISH_REASON_MAX_TOKENS" });
      check(tokens, { "every token came": (count) => count === TOKENS });
      whole.add(1);
    }
  });
  stream.on("error", (error) => check(error, { "no error": () => false }));
  stream.on("end", () => client.close());
  stream.write({
    generation: {
      text: `Stream ${__ITER} of ${__VU}`,
      stopping: { maxTokens: TOKENS, ignoreEos: true },
    },
  });
  stream.end();
}
