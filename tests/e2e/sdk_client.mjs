// One call of the TypeScript SDK: `node sdk_client.mjs SDK_FOLDER BASE_URL`, with the call as JSON on
// its standard input; what came of it goes as JSON to its standard output.
//
//   {"call": "create", "params": {...}, "key": "...", "host": "..."}
//
// call    create, stream, countTokens, models or batches
// key     the API key
// host    the Host header, where it is not to be that of the URL
//
// It prints {"result": ...}, for a stream {"result": the final message, "events": [type, ...]}, or
// {"error": {class, parents, status, type, message, requestID, retryAfter}}.

import { readFileSync } from 'node:fs';
import { request } from 'node:http';
import { createRequire } from 'node:module';

const [, , folder, baseURL] = process.argv;
const sdk = createRequire(`${folder}/package.json`)('@anthropic-ai/sdk');
const { call, params, key = 'none', host } = JSON.parse(readFileSync(0, 'utf-8'));

// The built-in fetch does not let anybody choose the Host header.
function fetchAs(host) {
  return (url, { method, headers, body }) =>
    new Promise((resolve, reject) => {
      const named = { ...Object.fromEntries(new Headers(headers)), host };
      const sent = request(url, { method, headers: named }, (answer) => {
        const chunks = [];
        answer.on('data', (chunk) => chunks.push(chunk));
        answer.on('end', () =>
          resolve(new Response(Buffer.concat(chunks), { status: answer.statusCode, headers: answer.headers })),
        );
      });
      sent.on('error', reject);
      sent.end(body);
    });
}

const client = new sdk.Anthropic({
  baseURL,
  apiKey: key,
  maxRetries: 0,
  ...(host ? { fetch: fetchAs(host) } : {}),
});

const calls = {
  create: async () => ({ result: await client.messages.create(params) }),
  countTokens: async () => ({ result: await client.messages.countTokens(params) }),
  batches: async () => ({ result: await client.messages.batches.list() }),
  models: async () => {
    const result = [];
    for await (const model of client.models.list()) result.push(model);
    return { result };
  },
  stream: async () => {
    const events = [];
    const stream = client.messages.stream(params);
    stream.on('streamEvent', (event) => events.push(event.type));
    return { result: await stream.finalMessage(), events };
  },
};

function described(error) {
  if (!(error instanceof sdk.APIError)) throw error;
  const parents = [];
  for (let kind = error.constructor; kind.name; kind = Object.getPrototypeOf(kind)) parents.push(kind.name);
  return {
    class: parents[0],
    parents: parents.slice(1),
    status: error.status,
    type: error.type,
    envelope: error.error,
    requestID: error.requestID,
    retryAfter: error.headers?.get('retry-after'),
  };
}

let said;
try {
  said = await calls[call]();
} catch (error) {
  said = { error: described(error) };
}
console.log(JSON.stringify(said));
