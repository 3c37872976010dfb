// A service worker that keeps what the page loads: the page opens again without a connection, and is newest with one.

self.addEventListener('install', () => self.skipWaiting())
self.addEventListener('activate', (event) => event.waitUntil(self.clients.claim()))
self.addEventListener('fetch', (event) => {
  const isOwn = new URL(event.request.url).origin === self.location.origin
  if (isOwn && event.request.method === 'GET') event.respondWith(fetchOrRecall(event))
})

async function fetchOrRecall(event) {
  const cache = await caches.open('page')
  try {
    const response = await fetch(event.request, { cache: 'no-cache' }) // asks the server whether its file is newer
    // kept while the page reads it, so that the page can show its progress
    if (response.ok) event.waitUntil(cache.put(event.request, response.clone()))
    return response
  } catch (error) {
    return (await cache.match(event.request)) ?? Promise.reject(error)
  }
}
