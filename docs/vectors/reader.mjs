// An independent reader of the formats in ../formats.md and ../encodings.md, for Node 18 or newer, with nothing but its standard library.
//
//   node reader.mjs verify TYPE THRESHOLD KEY.pub... < envelope   the payload's SHA-256, if THRESHOLD of the keys signed an envelope of TYPE
//   node reader.mjs lock < payload                                models.lock, from the payload of a snapshot
//   node reader.mjs payload < envelope                            the payload; verify it first
//   node reader.mjs tree FOLDER                                   the tree digest of a folder whose files are all named by SHA-256
//   node reader.mjs node STORE                                    the active digest of a store, computed from the bytes that serve
//   node reader.mjs equal STORE STORE                             "equal" or "different", exit code 0 or 2
//   node reader.mjs bundle FOLDER                                 the digest of a bundle's envelope, if all that the bundle names is in it
//   node reader.mjs place NETWORK ROLLOUT NODE                    a node's place in a rollout
import {createHash, createPublicKey, verify as verifySignature} from "node:crypto";
import {lstatSync, readFileSync, readdirSync, realpathSync} from "node:fs";
import {join} from "node:path";

const sha256 = (data) => createHash("sha256").update(data).digest("hex"), bytes = (text) => Buffer.from(text, "utf8");
const byCodePoint = (a, b) => Buffer.compare(bytes(a), bytes(b));
const [sorted, unique] = [(list) => [...list].sort(byCodePoint), (list) => [...new Set(list)]];
const fail = (why) => { throw new Error(why); }, input = () => readFileSync(0);
// -- JSON: the last of two equal keys would win silently, so they are refused --------------------------------------
function parse(data) {
  const text = new TextDecoder("utf-8", {fatal: true, ignoreBOM: true}).decode(data), value = JSON.parse(text);
  let [open, last] = [[], null];
  for (const [token] of text.matchAll(/"(?:[^"\\]|\\.)*"|[{}[\]:]/g)) {
    if (token === "{" || token === "[") open.push(token === "{" ? new Set() : null);
    else if (token === "}" || token === "]") open.pop();
    else if (token === ":") {
      if (open.at(-1).has(JSON.parse(last))) fail(`duplicate key ${last}`);
      open.at(-1).add(JSON.parse(last));
    } else last = token;
    if (open.length > 32) fail("nested deeper than 32");
  }
  return value;
}
// -- envelopes -----------------------------------------------------------------------------------------------------
function base64(text) {
  const data = Buffer.from(text, "base64");
  const plain = data.toString("base64");
  if (text !== plain && text !== plain.replaceAll("+", "-").replaceAll("/", "_")) fail("base64 that is not canonical");
  return data;
}
const P = 2n ** 255n - 19n;
const SMALL_ORDER = [0n, 1n, P - 1n, 0x7a03ac9277fdc74ec6cc392cfa53202a0f67100d760b3cba4fd84d3d706a17c7n,
  0x05fc536d880238b13933c6d305acdfd5f098eff289f4c345b027b2c28f95e826n];
function readKey(pem) {
  const key = createPublicKey(pem);
  if (key.asymmetricKeyType !== "ed25519") fail("not an Ed25519 key");
  const der = key.export({type: "spki", format: "der"});
  const y = BigInt("0x" + Buffer.from(der.subarray(-32)).reverse().toString("hex")) % 2n ** 255n;
  if (SMALL_ORDER.includes(y) || y >= P) fail("a key with which anybody could sign");
  return [sha256(der), key];
}
const pae = (type, payload) => Buffer.concat([bytes(`DSSEv1 ${bytes(type).length} ${type} ${payload.length} `), payload]);
function verify(data, type, threshold, pems) {
  if (data.length > 16 * 2 ** 20) fail("too large");
  const envelope = parse(data);
  for (const name of Object.keys(envelope)) if (!["payloadType", "payload", "signatures"].includes(name)) fail(`unknown field ${name}`);
  if (envelope.payloadType !== type) fail(`payload type ${envelope.payloadType}`);
  const payload = base64(envelope.payload);
  const keys = new Map(pems.map(readKey)), signed = envelope.signatures.slice(0, 64).filter(({keyid, sig}) => {
    try { return keys.has(keyid) && verifySignature(null, pae(type, payload), keys.get(keyid), base64(sig)); } catch { return false; }
  });
  const count = new Set(signed.map(({keyid}) => keyid)).size;
  if (count < threshold || count === 0) fail(`${count} valid signatures, ${threshold} needed`);
  return payload;
}
// -- the lock ------------------------------------------------------------------------------------------------------
class Float { constructor(value) { this.value = value; } }
class Instant { constructor(text) { this.text = new Date(Math.floor(Date.parse(text) / 1000) * 1000).toISOString().slice(0, 19) + "Z"; } }
function expand(template, digest) {
  const [algorithm, hex] = digest.split(":");
  return template.replaceAll("{algorithm}", algorithm).replaceAll("{hex}", hex).replaceAll("{hex:2}", hex.slice(0, 2));
}
function lockedExpect({text, regex, min_tokens = 0, tokens, min_rate = 0, dimension, answer}) {
  const {tokens: ids = [], sure = [], embedding = [], cosine = 0.999, prompt: asked, margin, version} = answer ?? {};
  const made = answer && {tokens: ids, sure, embedding: embedding.map((one) => new Float(one)), cosine: new Float(cosine),
    prompt: asked, margin: margin === undefined ? undefined : new Float(margin), version};
  return {text, regex, min_tokens, tokens, min_rate, dimension, answer: made};
}
function lockedModel(model) {
  const artifacts = [...model.artifacts].sort((a, b) => byCodePoint(a.path, b.path));
  const {task = "completion", prompt = "Hello", max_tokens = 8, seed = 0, expect = {}, timeout = "120s"} = model.smoke ?? {};
  return {
    id: `${model.name}:${model.version}`, state: model.state ?? "enabled",
    replaces: some(sorted(model.replaces ?? [])), requires: some(unique(sorted(model.requires ?? []))),
    tasks: sorted(model.tasks), entrypoint: model.entrypoint, gpu_memory: model.gpu_memory ?? 0, memory: model.memory ?? 0,
    runtime: {engine: model.runtime.engine, version: model.runtime.version ?? ""},
    smoke: {task, prompt, max_tokens, seed, expect: lockedExpect(expect), timeout},
    roles: some(Object.fromEntries(artifacts.filter(({role}) => role).map(({path, role}) => [path, role]))),
    artifact: artifacts.map(({path, digest, unpack}) => ({path, digest, unpack})),
  };
}
const some = (value) => (Object.keys(value).length ? value : undefined);
const table = (value, make) => some(Object.fromEntries(sorted(Object.keys(value ?? {})).map((key) => [key, make(value[key])])));
function compile(payload) {
  const found = parse(payload);
  if (found.schema !== 1) fail("unknown schema");
  const {fallback = [], allow_node_fallback = true, redirects} = found.sources ?? {};
  const models = [...found.models].sort((a, b) => byCodePoint(`${a.name}:${a.version}`, `${b.name}:${b.version}`));
  const blobs = {};
  for (const model of models)
    for (const one of [...model.artifacts].sort((a, b) => byCodePoint(a.path, b.path))) {
      blobs[one.digest] ??= {size: one.size, sources: []};
      blobs[one.digest].sources.push(...(one.urls ?? []));
    }
  const header = "# models.lock: what the network's signed snapshot compiles to. Made by `reconcile lock`; commit it with snapshot.json.\n" +
    "# Do not edit: every command compiles the snapshot again and refuses a lock that differs.\n\n";
  return header + toml({
    schema: 1, network: found.network, retest_after: found.retest_after ?? "", allow_node_fallback,
    redirects: table(redirects, (patterns) => unique(sorted(patterns))), names: table(found.names, (version) => version),
    rollouts: table(found.rollouts, ({models = [], per_10000 = 0, cohorts = []}) =>
      ({models: unique(sorted(models)), per_10000, cohorts: unique(sorted(cohorts))})),
    snapshot: {version: found.version, digest: `sha256:${sha256(payload)}`, issued_at: new Instant(found.issued_at),
      expires_at: new Instant(found.expires_at)},
    model: models.map(lockedModel),
    blob: Object.fromEntries(sorted(Object.keys(blobs)).map((digest) =>
      [digest, {size: blobs[digest].size, sources: unique([...blobs[digest].sources, ...fallback.map((url) => expand(url, digest))])}])),
  });
}
// -- TOML: the layout is a part of the bytes -----------------------------------------------------------------------
const isTable = (value) => typeof value === "object" && !Array.isArray(value) && !(value instanceof Float) && !(value instanceof Instant);
const entries = (value) => Object.entries(value).filter(([, child]) => child !== undefined && child !== null);
const ESCAPES = {"\b": "\\b", "\n": "\\n", "\f": "\\f", "\r": "\\r", '"': '\\"', "\\": "\\\\"};
const escape = (one) => ESCAPES[one] ?? "\\u" + one.charCodeAt(0).toString(16).padStart(4, "0");
const string = (text) => `"${text.replace(/[\0-\x08\x0a-\x1f\x7f"\\]/g, escape)}"`;
const key = (text) => (/^[A-Za-z0-9_-]+$/.test(text) ? text : string(text));
function float(value) {
  if (Object.is(value, -0)) return "-0.0";
  const [digits, exponent] = value.toExponential().split("e").map((part, index) => (index ? Number(part) : part));
  if (exponent < -4 || exponent >= 16) return `${digits}e${exponent < 0 ? "-" : "+"}${String(Math.abs(exponent)).padStart(2, "0")}`;
  const text = exponent < 0 || digits.includes(".") ? value.toFixed(Math.max(0, digits.replace(/^-?\d\.?/, "").length - exponent)) : String(value);
  return text.includes(".") ? text : `${text}.0`;
}
function literal(value, depth = 0) {
  if (value instanceof Float) return float(value.value);
  if (value instanceof Instant) return value.text;
  if (typeof value === "string") return string(value);
  if (isTable(value)) return entries(value).length ? `{ ${entries(value).map(([k, v]) => `${key(k)} = ${literal(v)}`).join(", ")} }` : "{}";
  if (!Array.isArray(value)) return String(value);
  const indent = "    ".repeat(depth);
  return value.length ? `[\n${value.map((one) => `${indent}    ${literal(one, depth + 1)}`).join(",\n")},\n${indent}]` : "[]";
}
const short = (value) => { const text = `    ${literal(value)},`; return [...text].length <= 100 && !text.includes("\n"); };
function toml(value, name = "", listed = false) {
  const [lines, tables] = [[], []];
  for (const [k, v] of entries(value)) {
    if (isTable(v)) tables.push([k, v, false]);
    else if (Array.isArray(v) && v.length && v.every(isTable) && !v.every(short)) tables.push(...v.map((one) => [k, one, true]));
    else lines.push(`${key(k)} = ${literal(v)}\n`);
  }
  const head = listed ? `[[${name}]]\n` : name && (lines.length || !tables.length) ? `[${name}]\n` : "";
  const parts = head || lines.length ? [head + lines.join("")] : [];
  return [...parts, ...tables.map(([k, v, list]) => toml(v, name ? `${name}.${key(k)}` : key(k), list))].join("\n");
}
// -- a node --------------------------------------------------------------------------------------------------------
function files(folder, under = "") {
  return readdirSync(join(folder, under), {withFileTypes: true}).flatMap((one) => {
    const path = under ? `${under}/${one.name}` : one.name;
    return one.isDirectory() ? files(folder, path) : [path];
  });
}
function tree(folder) {
  const listing = sorted(files(folder)).map((path) => {
    if (!lstatSync(join(folder, path)).isFile()) fail(`${path} is not a plain file`);
    const data = readFileSync(join(folder, path));
    return {path, digest: `sha256:${sha256(data)}`, size: data.length};
  });
  return `sha256:${sha256(bytes(JSON.stringify(listing)))}`;
}
function activeDigest(store) {
  const active = realpathSync(join(store, "active"));
  const models = parse(readFileSync(join(active, "index.json"))).models;
  const lines = sorted(models.map(({id, path}) => `${id} ${tree(realpathSync(join(active, path)))}\n`));
  return `sha256:${sha256(bytes(lines.join("")))}`;
}
function bundle(folder) {
  const read = (digest) => {
    const data = readFileSync(join(folder, "blobs", ...digest.split(":")));
    return digest === `sha256:${sha256(data)}` ? data : fail(`${digest} has other bytes`);
  };
  const {manifests} = parse(readFileSync(join(folder, "index.json")));
  const {config: {mediaType, digest}} = parse(read(manifests.length === 1 ? manifests[0].digest : fail("not one manifest")));
  const {schema, envelope, roots = [], blobs = {}} = parse(read(digest));
  if (schema !== 1 || mediaType !== "application/vnd.reconciler.bundle.config.v1+json") fail("no bundle of version 1");
  [envelope, ...roots, ...Object.keys(blobs)].forEach(read);
  return envelope;
}
const place = (...parts) => Number(BigInt("0x" + sha256(bytes(parts.join("\0"))).slice(0, 16)) % 10000n);
const [command, ...rest] = process.argv.slice(2);
const COMMANDS = {
  verify: (type, threshold, ...pems) => sha256(verify(input(), type, Number(threshold), pems.map((path) => readFileSync(path)))) + "\n",
  lock: () => compile(input()), payload: () => base64(parse(input()).payload), tree: (folder) => tree(folder) + "\n",
  node: (store) => activeDigest(store) + "\n", bundle: (folder) => bundle(folder) + "\n", place: (...parts) => `${place(...parts)}\n`,
  equal: (a, b) => { if (activeDigest(a) === activeDigest(b)) return "equal\n"; process.exitCode = 2; return "different\n"; },
};
try {
  process.stdout.write((COMMANDS[command] ?? fail("see the head of this file"))(...rest));
} catch (error) {
  process.stderr.write(`${error.message}\n`);
  process.exitCode = 1;
}
