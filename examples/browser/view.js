// What the visitor does, and what is shown: files and recordings go through audio.js and model.js to bars and pictures.

import { FORMATS, readSound, startRecording } from './audio.js'
import { loadModel } from './model.js'
import { logMel } from './spectrogram.js'

const NUM_BARS = 5
const NUM_ROWS = 6
// from the lowest value of a picture to the highest
const COLORS = [
  [13, 8, 70],
  [91, 20, 140],
  [186, 54, 109],
  [248, 130, 62],
  [252, 253, 191],
]

const page = (id) => document.getElementById(id)
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`
let newest = 0 // the last sound; what is left of earlier ones is dropped
let address // of the sound in the player

// element('p', 'a class', 'a text')
function element(name, className, text = '') {
  const created = document.createElement(name)
  if (className) created.className = className
  created.textContent = text
  return created
}

/** A line of text, and a bar below it if `share` is given: a number, or null for work of unknown length. */
function say(text, share, isError = false) {
  page('message').textContent = text
  page('message').classList.toggle('error', isError)
  page('message').setAttribute('aria-busy', share !== undefined) // screen readers read what it ends with
  page('progress').hidden = share === undefined
  if (share == null) page('progress').removeAttribute('value')
  else page('progress').value = share
}

const failed = (error) => say(error.message, undefined, true)

const loading = start()
loading.then(() => newest || say('Ready.'), failed)

async function start() {
  say('Loading the model …', null)
  await keepForOffline()
  const model = await loadModel((bytes, total) => {
    say(`Loading the model: ${megabytes(bytes)}${total ? ` of ${megabytes(total)}` : ''}`, total ? bytes / total : null)
  }).catch((error) => {
    throw new Error(`The model could not be loaded: ${error.message}`)
  })
  page('facts').textContent = `Model: ${megabytes(model.bytes)}, ${model.labels.length} labels. Takes ${FORMATS}.`
  page('vocabulary').hidden = false
  page('vocabulary').firstElementChild.textContent = 'All labels'
  page('vocabulary').lastElementChild.textContent = model.labels.join(', ')
  return model
}

/** Has offline.js running before the large files are loaded, and gives it the small ones, loaded before it ran. */
async function keepForOffline() {
  if (!navigator.serviceWorker) return // pages from http:// have none
  try {
    await navigator.serviceWorker.register('offline.js')
    const seconds = new Promise((resolve) => setTimeout(resolve, 3000))
    await Promise.race([navigator.serviceWorker.ready, seconds])
    const loaded = performance.getEntriesByType('resource').map((entry) => entry.name)
    await (await caches.open('page')).addAll([...new Set([location.pathname, ...loaded, 'microphone.js'])])
  } catch (error) {
    console.info(`The page will not open without a connection: ${error.message}`)
  }
}

async function show(file) {
  const number = ++newest
  page('result').hidden = true
  try {
    const model = await loading
    say(`Reading ${file.name} …`, null)
    const samples = await readSound(file, model.rate)
    const result = await model.classify(samples, (index, count) => {
      if (number !== newest) throw new Error(`${file.name} is dropped.`) // which nobody reads
      say(`Listening to ${file.name} …`, count === 1 ? null : index / count)
    })
    if (number !== newest) return
    say('')
    fill(model, file, samples, result)
  } catch (error) {
    if (number === newest) failed(error)
  }
}

function fill(model, file, samples, { scores, timeline }) {
  const isNumber = model.function === 'none'
  const inWords = (score) => (isNumber ? score.toPrecision(4) : `${(100 * score).toFixed(1)} %`)
  const order = scores.map((_, label) => label).sort((a, b) => scores[b] - scores[a])
  const best = order[0]
  const seconds = samples.length / model.rate

  page('name').textContent = `${file.name}, ${seconds < 10 ? seconds.toFixed(2) : seconds.toFixed(1)} s`
  page('answer').textContent = `${model.labels[best]}: ${inWords(scores[best])}`
  page('spoken').textContent = `${file.name}: ${page('answer').textContent}`
  const bars = order.map((label) => {
    const item = element('li')
    item.dataset.score = scores[label]
    item.append(element('span', 'label', model.labels[label]), element('span', 'score', inWords(scores[label])))
    if (!isNumber) {
      const track = element('span', 'track')
      track.append(element('span'))
      track.firstChild.style.width = `${100 * scores[label]}%`
      item.append(track)
    }
    return item
  })
  page('bars').replaceChildren(...bars.slice(0, NUM_BARS))
  page('others').hidden = bars.length <= NUM_BARS
  page('others').firstElementChild.textContent = `${bars.length - NUM_BARS} other labels`
  page('others').lastElementChild.replaceChildren(...bars.slice(NUM_BARS))

  URL.revokeObjectURL(address)
  page('player').src = address = URL.createObjectURL(file)
  page('result').hidden = false
  paint(page('picture'), logMel(samples, model.rate, model.bins))
  page('timeline').replaceChildren(...(timeline.length > 1 ? [table(model, timeline, order, inWords)] : []))
  page('axis').replaceChildren(...[0, 0.5, 1].map((part) => element('span', '', clock(part * seconds))))
  const windows = `Below it, the scores in ${timeline.length} windows that overlap; the best label of each is underlined.`
  page('caption').textContent = `Time to the right, pitch upwards. ${timeline.length > 1 ? windows : ''}`
  page('picture').setAttribute('aria-label', 'Log-mel spectrogram of the sound')
}

/** Scores over time: a row for each label that is the best of a window, and for the best of the whole sound. */
function table(model, timeline, order, inWords) {
  const bestOf = timeline.map(({ scores }) => scores.indexOf(Math.max(...scores)))
  const rows = order.filter((label, place) => place === 0 || bestOf.includes(label)).slice(0, NUM_ROWS)
  const values = timeline.flatMap(({ scores }) => rows.map((label) => scores[label]))
  const [low, high] = model.function === 'none' ? [Math.min(...values), Math.max(...values)] : [0, 1]
  const created = element('table')
  created.append(element('caption', 'unseen', 'Scores over time'))
  const body = created.createTBody()
  for (const label of rows) {
    const heading = body.insertRow().appendChild(element('th', '', model.labels[label]))
    heading.scope = 'rowgroup'
    heading.colSpan = timeline.length
    const row = body.insertRow()
    timeline.forEach(({ start, end, scores }, index) => {
      const cell = row.insertCell()
      const words = `${clock(start)} to ${clock(end)}: ${inWords(scores[label])}`
      cell.append(element('span', 'unseen', words))
      cell.title = words
      cell.classList.toggle('best', bestOf[index] === label)
      cell.style.setProperty('--share', `${(100 * (scores[label] - low)) / (high - low || 1)}%`)
    })
  }
  return created
}

function paint(canvas, { columns, bins, values }) {
  ;[canvas.width, canvas.height] = [columns, bins]
  const image = new ImageData(columns, bins)
  const [low, high] = values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity])
  values.forEach((value, index) => {
    const [column, bin] = [Math.floor(index / bins), index % bins]
    const place = ((value - low) / (high - low || 1)) * (COLORS.length - 1)
    const below = Math.min(Math.floor(place), COLORS.length - 2)
    const color = COLORS[below].map((part, rgb) => part + (place - below) * (COLORS[below + 1][rgb] - part))
    image.data.set([...color, 255], 4 * ((bins - 1 - bin) * columns + column))
  })
  canvas.getContext('2d').putImageData(image, 0, 0)
}

const clock = (seconds) => {
  if (seconds < 60) return `${Number(seconds.toFixed(seconds < 10 ? 2 : 1))} s`
  const whole = Math.round(seconds)
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, '0')}`
}

page('file').addEventListener('change', ({ target }) => {
  if (target.files.length > 0) show(target.files[0])
  target.value = '' // so that the same file can be chosen again
})

for (const type of ['dragover', 'dragleave', 'drop']) {
  document.addEventListener(type, (event) => {
    event.preventDefault()
    document.body.classList.toggle('dropping', type === 'dragover')
    if (type === 'drop' && event.dataTransfer.files.length > 0) show(event.dataTransfer.files[0])
  })
}

let stopRecording = null
page('record').addEventListener('click', async () => {
  if (stopRecording) return stopRecording()
  page('record').disabled = true
  say('Allow the browser to use the microphone.')
  try {
    const { finished, stop } = await startRecording((seconds, peak) => {
      page('record-text').textContent = `Stop (${clock(Math.floor(seconds))})`
      page('level').firstElementChild.style.width = `${100 * Math.min(1, peak) ** 0.5}%`
    })
    stopRecording = stop
    document.body.classList.add('recording')
    page('level').hidden = false
    page('record-text').textContent = 'Stop (0 s)'
    page('record').disabled = false
    say('Recording …')
    show(await finished)
  } catch (error) {
    failed(error)
  } finally {
    stopRecording = null
    document.body.classList.remove('recording')
    page('level').hidden = true
    page('record-text').textContent = 'Record'
    page('record').disabled = false
  }
})
