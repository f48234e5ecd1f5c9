-- End a job from outside the worker that decodes it.
-- KEYS: job, log, turn · ARGV: job id, channel, terminal, mode, lease
-- Mode 'cancel': end it if no worker has it, else ask its worker to. 'unheld': end it unless a worker was heard of within the lease.
-- 'always': end it. Returns: 'missing' | 'done' | 'ended' | 'asked' | 'held'
local job = redis.call('HMGET', KEYS[1], 'state', 'renewed')
if not job[1] then
  return 'missing'
end
if job[1] == 'done' then
  return 'done'
end
local now = now_ms()
if job[1] == 'running' then
  if ARGV[4] == 'cancel' then
    redis.call('HSET', KEYS[1], 'cancel', '1')
    return 'asked'
  end
  if ARGV[4] == 'unheld' and tonumber(job[2]) + tonumber(ARGV[5]) > now then
    return 'held'
  end
end
close(KEYS[1], KEYS[2], KEYS[3], ARGV[1], ARGV[2], ARGV[3], now)
return 'ended'
