// Ask a weakseg server for masks from Node.js.
//
//     npm ci                                                    # in this folder
//     weakseg serve --demo                                      # in one terminal
//     node client.mjs localhost:8500 IMAGE [IMAGE …]            # in another
//
// Prints what the first image shows, and writes <image>-mask.png (class ids, palette) of each to the folder `masks`.

import { mkdir, readFile, writeFile } from "node:fs/promises";
import path from "node:path";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const DEADLINE_MS = 30_000;
const IN_FLIGHT = 8;
const MAX_MESSAGE_BYTES = 32 * 2 ** 20; // gRPC's own limit for responses is 4 MiB

// The contract with all that it imports, google.rpc among them. From the .proto files the same is
// protoLoader.load("weakseg/v1/segmentation_service.proto", { includeDirs: ["proto", <a folder with google/rpc>] }).
const contract = await readFile(new URL("../../proto/contract.binpb", import.meta.url));
const types = protoLoader.loadFileDescriptorSetFromBuffer(contract, {
  keepCase: true,
  enums: String,
  longs: Number,
  defaults: true,
  oneofs: true,
});
const { SegmentationService } = grpc.loadPackageDefinition(types).weakseg.v1;

// A unary call as a promise, with a deadline: without one a call may wait for ever.
function ask(client, method, request) {
  return new Promise((resolve, reject) => {
    const answered = (error, response) => (error ? reject(error) : resolve(response));
    client[method](request, { deadline: Date.now() + DEADLINE_MS }, answered);
  });
}

// The reason of a google.rpc.Status, such as IMAGE_UNDECODABLE or QUEUE_FULL: docs/serving.md lists them.
function reasonOfStatus(status) {
  const info = status.details.find(({ type_url }) => type_url.endsWith("/google.rpc.ErrorInfo"));
  return info ? types["google.rpc.ErrorInfo"].deserialize(info.value).reason : "";
}

// The same of a call that failed; gRPC's own errors, such as that no server answers, have no details, but a code.
function reasonOfError(error) {
  const [details] = error.metadata?.get("grpc-status-details-bin") ?? [];
  return details ? reasonOfStatus(types["google.rpc.Status"].deserialize(details)) : grpc.status[error.code] ?? error.code;
}

function requestOf(data, kinds, id = "") {
  return { request_id: id, image: { encoded: data }, outputs: kinds.map((kind) => ({ kind })) };
}

// [path, SegmentStreamResponse] of each image, over one call, as they come; at most IN_FLIGHT are under way.
async function* segmentMany(client, paths, kinds) {
  const call = client.SegmentStream();
  call.on("error", () => {}); // the loop below throws it; a call that is left early tells so after that
  let sent = 0;
  async function sendNext() {
    if (sent < paths.length) {
      const index = sent++;
      call.write({ request: requestOf(await readFile(paths[index]), kinds, String(index)) });
    } else if (!call.writableEnded) {
      call.end();
    }
  }
  try {
    for (let slot = 0; slot < IN_FLIGHT; slot++) await sendNext();
    for await (const answer of call) {
      yield [paths[Number(answer.request_id)], answer];
      await sendNext();
    }
  } finally {
    call.cancel();
  }
}

async function main(target, paths) {
  const client = new SegmentationService(target, grpc.credentials.createInsecure(), {
    "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
    "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
  });
  const { model } = await ask(client, "GetModel", {});
  const names = model.classes.map(({ name }) => name);
  console.log(`${model.ref.name}/${model.ref.version} on ${model.execution_provider}: ${names.slice(1).join(", ")}`);

  // One image, everything that the model can say about it.
  const { scores } = await ask(client, "Segment", requestOf(await readFile(paths[0]), model.output_kinds));
  for (const { label, score, present } of scores) {
    console.log(`  ${label}: score ${score.toFixed(2)}${present ? ", present" : ""}`);
  }

  // Many images over one stream. One that fails is an answer, too, and the others go on.
  await mkdir("masks", { recursive: true });
  for await (const [image, { result, error, response }] of segmentMany(client, paths, ["OUTPUT_KIND_SEGMENTATION"])) {
    if (result === "error") {
      console.error(`${image}: ${reasonOfStatus(error)}: ${error.message}`);
      process.exitCode = 1;
      continue;
    }
    const file = path.join("masks", `${path.parse(image).name}-mask.png`);
    await writeFile(file, response.outputs[0].mask.data);
    console.log(`${image}: ${response.image_width}x${response.image_height}, ${file}`);
  }
  client.close();
}

const [target, ...paths] = process.argv.slice(2);
if (paths.length === 0) {
  console.error("usage: node client.mjs HOST:PORT IMAGE [IMAGE …]");
  process.exitCode = 2;
} else {
  await main(target, paths).catch((error) => {
    console.error(`${reasonOfError(error)}: ${error.details ?? error.message}`);
    process.exitCode = 1;
  });
}
