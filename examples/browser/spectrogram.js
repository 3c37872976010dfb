// One channel -> the log-mel picture that the model sees: 25 ms windows, mel filters from 20 Hz to half the rate.

const MAX_COLUMNS = 600 // of a longer sound, a window every so often

/** `{ columns, bins, values }`: Float32Array of `columns * bins` logarithms, time-major, lowest frequency first. */
export function logMel(samples, rate, bins) {
  const size = Math.floor(0.025 * rate)
  const columns = Math.max(1, Math.min(MAX_COLUMNS, 1 + Math.floor((samples.length - size) / (0.01 * rate))))
  const hop = columns === 1 ? 0 : Math.floor((samples.length - size) / (columns - 1))
  const fftSize = 2 ** Math.ceil(Math.log2(size))
  const hann = Float64Array.from({ length: size }, (_, n) => 0.5 - 0.5 * Math.cos((2 * Math.PI * n) / (size - 1)))
  const filters = melFilters(rate, bins, fftSize)
  const values = new Float32Array(columns * bins)
  for (let column = 0; column < columns; column++) {
    const frame = samples.subarray(column * hop, column * hop + size)
    const mean = frame.reduce((sum, sample) => sum + sample, 0) / frame.length
    const [real, imaginary] = [new Float64Array(fftSize), new Float64Array(fftSize)]
    frame.forEach((sample, n) => (real[n] = hann[n] * (sample - mean - 0.97 * (frame[Math.max(0, n - 1)] - mean))))
    transform(real, imaginary)
    filters.forEach(({ first, weights }, bin) => {
      const energy = weights.reduce((sum, weight, k) => sum + weight * (real[first + k] ** 2 + imaginary[first + k] ** 2), 0)
      values[column * bins + bin] = Math.log(Math.max(energy, 2 ** -23))
    })
  }
  return { columns, bins, values }
}

function melFilters(rate, bins, fftSize) {
  const mel = (hertz) => 1127 * Math.log1p(hertz / 700)
  const step = (mel(rate / 2) - mel(20)) / (bins + 1)
  return Array.from({ length: bins }, (_, bin) => {
    const center = mel(20) + (bin + 1) * step
    const height = (k) => 1 - Math.abs(mel((k * rate) / fftSize) - center) / step
    const used = [...Array(fftSize / 2).keys()].filter((k) => height(k) > 0)
    return { first: used[0] ?? 0, weights: used.map(height) }
  })
}

/** The discrete Fourier transform in place; the length is a power of 2. */
function transform(real, imaginary) {
  const size = real.length
  for (let index = 1, mirror = 0; index < size; index++) {
    let bit = size >> 1
    for (; mirror & bit; bit >>= 1) mirror ^= bit
    mirror ^= bit
    if (index < mirror) [real[index], real[mirror]] = [real[mirror], real[index]]
  }
  for (let length = 2; length <= size; length *= 2) {
    for (let k = 0; k < length / 2; k++) {
      const [cosine, sine] = [Math.cos((2 * Math.PI * k) / length), -Math.sin((2 * Math.PI * k) / length)]
      for (let even = k; even < size; even += length) {
        const odd = even + length / 2
        const [x, y] = [real[odd] * cosine - imaginary[odd] * sine, real[odd] * sine + imaginary[odd] * cosine]
        ;[real[odd], imaginary[odd]] = [real[even] - x, imaginary[even] - y]
        ;[real[even], imaginary[even]] = [real[even] + x, imaginary[even] + y]
      }
    }
  }
}
