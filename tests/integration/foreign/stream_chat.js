// Streams a chat with Node's @grpc/grpc-js, and prints what came as one JSON object.
//   node stream_chat.js NODE_MODULES PROTOS ADDRESS

const path = require("node:path");

const [modules, protos, address] = process.argv.slice(2);
const grpc = require(path.join(modules, "@grpc/grpc-js"));
const protoLoader = require(path.join(modules, "@grpc/proto-loader"));

const definition = protoLoader.loadSync("mili/v1/inference.proto", {
  includeDirs: [protos],
  keepCase: true,
  longs: Number,
  enums: String,
  oneofs: true,
  defaults: true,
});
const { InferenceService } = grpc.loadPackageDefinition(definition).mili.v1;
const client = new InferenceService(address, grpc.credentials.createInsecure());

function stream(generation) {
  return new Promise((resolve) => {
    const told = { events: [], text: "", sequences: [] };
    const call = client.GenerateStream({ generation }, { deadline: Date.now() + 30_000 });
    call.on("data", ({ event }) => {
      told.sequences.push(event.sequence);
      told.events.push(event.event);
      if (event.delta) told.text += event.delta.text;
      if (event.finished) {
        told.finish_reason = event.finished.finish_reason;
        told.usage = event.finished.usage;
      }
    });
    call.on("error", ({ code, details }) => resolve({ ...told, code, details }));
    call.on("end", () => resolve({ ...told, code: grpc.status.OK }));
  });
}

async function main() {
  const chat = { messages: [{ role: "user", content: "Hi" }] };
  const greedy = { temperature: 0 };
  const stopping = { max_tokens: 24, ignore_eos: true };
  const answer = await stream({ chat, sampling: greedy, stopping });
  const refused = await stream({ chat, sampling: { top_p: 7 } });
  console.log(JSON.stringify({ answer, refused }));
  client.close();
}

main();
