// Changes the sampling rate with a Kaiser-windowed sinc. Its band is that of soxr's "HQ", which the Python package uses:
// flat to 91 % of the lower Nyquist frequency, and 128 dB down from that frequency on.

const FLAT = 0.913
const ATTENUATION = 128
const MILLISECONDS_OF_WORK = 30

/**
 * `round(samples.length * toRate / fromRate)` samples as a Float32Array. `flat` is the part of the lower Nyquist frequency
 * that stays, `attenuation` in dB what happens to the rest. It pauses, so that the page answers.
 */
export async function resample(samples, fromRate, toRate, flat = FLAT, attenuation = ATTENUATION) {
  if (fromRate === toRate) return samples
  const divisor = greatestCommonDivisor(fromRate, toRate)
  const [step, phases] = [fromRate / divisor, toRate / divisor]
  const ratio = Math.min(1, toRate / fromRate)
  // the window's shape, and the samples on each side of its center (Kaiser's estimates)
  const beta = 0.1102 * (attenuation - 8.7)
  const half = Math.ceil((attenuation - 8) / (2.285 * Math.PI * (1 - flat)) / 2 / ratio)
  const cutoff = (ratio * (1 + flat)) / 2
  const padded = new Float32Array(samples.length + 2 * half)
  padded.set(samples, half)

  let start = performance.now()
  const filters = new Map() // one for each distance between an output and the inputs around it
  const outputs = new Float32Array(Math.floor((2 * samples.length * toRate + fromRate) / (2 * fromRate)))
  for (let index = 0; index < outputs.length; index++) {
    const phase = (index * step) % phases
    if (!filters.has(phase)) filters.set(phase, filter(phase / phases, half, cutoff, beta))
    const taps = filters.get(phase)
    const first = (index * step - phase) / phases + 1 // inputs `half - 1` before to `half` after, in `padded`
    let sum = 0
    for (let tap = 0; tap < taps.length; tap++) sum += taps[tap] * padded[first + tap]
    outputs[index] = sum
    if (index % 256 === 0 && performance.now() - start > MILLISECONDS_OF_WORK) {
      await new Promise((resolve) => setTimeout(resolve))
      start = performance.now()
    }
  }
  return outputs
}

/** Weights of the `2 * half` inputs around an output that lies `offset` samples after one of them. */
function filter(offset, half, cutoff, beta) {
  return Float64Array.from({ length: 2 * half }, (_, tap) => {
    const distance = tap - half + 1 - offset
    const x = Math.PI * cutoff * distance
    const window = bessel(beta * Math.sqrt(Math.max(0, 1 - (distance / half) ** 2))) / bessel(beta)
    return cutoff * (x === 0 ? 1 : Math.sin(x) / x) * window
  })
}

/** The modified Bessel function of the first kind, of order 0. */
function bessel(x) {
  let [sum, term] = [1, 1]
  for (let k = 1; term > 1e-12 * sum; k++) sum += term *= (x / (2 * k)) ** 2
  return sum
}

function greatestCommonDivisor(a, b) {
  return b === 0 ? a : greatestCommonDivisor(b, a % b)
}
