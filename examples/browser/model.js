// One channel at the model's rate -> scores of its labels, as `pipeline("audio-classification")` computes them.

import * as ort from './runtime/ort.wasm.bundle.min.mjs'

const WINDOW_SECONDS = 30
const OVERLAP = 0.5
const RUNTIME = 'runtime/ort-wasm-simd-threaded.wasm'
const WEIGHTS = 'model/waveform.onnx'

const FUNCTIONS = {
  softmax: (logits) => {
    const largest = Math.max(...logits)
    const exponentials = logits.map((logit) => Math.exp(logit - largest))
    const sum = exponentials.reduce((a, b) => a + b)
    return exponentials.map((value) => value / sum)
  },
  sigmoid: (logits) => logits.map((logit) => 1 / (1 + Math.exp(-logit))),
  none: (logits) => logits,
}

/** Loads runtime and model; `onProgress(bytes, total)`, whose total is null where the server does not state it. */
export async function loadModel(onProgress) {
  const [config, extractor] = await Promise.all(['config', 'preprocessor_config'].map(readJson))
  const sizes = new Map()
  const report = (name) => (bytes, total) => {
    sizes.set(name, [bytes, total])
    const sum = (column) => [...sizes.values()].reduce((result, row) => result + row[column], 0)
    const isKnown = sizes.size === 2 && [...sizes.values()].every((row) => row[1])
    onProgress(sum(0), isKnown ? sum(1) : null)
  }
  const [runtime, weights] = await Promise.all([
    download(RUNTIME, report('runtime')),
    download(WEIGHTS, report('model')),
  ])
  ort.env.wasm.wasmBinary = runtime.buffer
  ort.env.wasm.proxy = true // a thread of its own, so that the page answers while the model runs
  ort.env.wasm.numThreads = crossOriginIsolated ? 0 : 1 // 0: chosen by the runtime
  const bytes = weights.length // before they move to that thread
  const session = await ort.InferenceSession.create(weights)
  return new Model(session, config, extractor, bytes)
}

class Model {
  constructor(session, config, extractor, bytes) {
    const labels = Object.keys(config.id2label).map((index) => config.id2label[index])
    Object.assign(this, { session, bytes, labels, rate: extractor.sampling_rate, bins: config.num_mel_bins })
    this.function = functionOf(config.problem_type, labels.length)
  }

  /**
   * The scores of samples at `rate`: `{ scores, timeline }`, with an array of one score for each label, the mean over
   * windows of 30 s, and `{ start, end, scores }` of each window, in seconds. Before each window, `onWindow(index, count)`.
   */
  async classify(samples, onWindow = () => {}) {
    const windows = cut(samples.length, WINDOW_SECONDS * this.rate)
    const timeline = []
    for (const [index, [first, last]] of windows.entries()) {
      onWindow(index, windows.length)
      const waveform = new ort.Tensor('float32', samples.slice(first, last), [1, last - first])
      const { logits } = await this.session.run({ waveform })
      const scores = FUNCTIONS[this.function]([...logits.data])
      timeline.push({ start: first / this.rate, end: last / this.rate, scores })
    }
    const mean = (label) => timeline.reduce((sum, window) => sum + window.scores[label], 0) / timeline.length
    return { scores: this.labels.map((_, label) => mean(label)), timeline }
  }
}

function functionOf(problemType, numLabels) {
  if (problemType === 'multi_label_classification') return 'sigmoid'
  return problemType === 'regression' || (!problemType && numLabels === 1) ? 'none' : 'softmax'
}

/** First and last sample of windows of the same length that overlap; the last one ends with the sound. */
function cut(total, window) {
  const starts = [0]
  while (starts.at(-1) + window < total) starts.push(Math.min(starts.at(-1) + window * (1 - OVERLAP), total - window))
  return starts.map((start) => [start, Math.min(start + window, total)])
}

async function readJson(name) {
  const response = await fetch(`model/${name}.json`)
  if (!response.ok) throw new Error(`model/${name}.json cannot be loaded (${response.status}).`)
  return response.json()
}

async function download(path, onProgress) {
  const response = await fetch(path)
  if (!response.ok) throw new Error(`${path} cannot be loaded (${response.status}).`)
  const isCompressed = response.headers.has('content-encoding')
  const total = isCompressed ? null : Number(response.headers.get('content-length')) || null
  const chunks = []
  let length = 0
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read()
    if (done) break
    chunks.push(value)
    length += value.length
    onProgress(length, total)
  }
  return new Uint8Array(await new Blob(chunks).arrayBuffer())
}
