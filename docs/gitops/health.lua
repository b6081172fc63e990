-- Argo CD's health of a FineTuneJob and a FineTuneProfile; docs/gitops/argo-cd.md says how to install it.

-- false: Healthy when the model is published. true: Healthy as soon as all trainers run, so a sync does not wait for the training.
local healthy_when_running = false

-- A profile has no status: what is wrong with one, the jobs that use it say.
if obj.kind == "FineTuneProfile" then
  return { status = "Healthy", message = "" }
end

local status = obj.status or {}
local conditions = {}
for _, condition in ipairs(status.conditions or {}) do
  conditions[condition.type] = condition
end

local function is_true(name)
  return conditions[name] ~= nil and conditions[name].status == "True"
end

local function answer(health)
  local ready = conditions.Ready
  return { status = health, message = ready.reason .. ": " .. ready.message }
end

if conditions.Ready == nil or status.observedGeneration ~= obj.metadata.generation then
  return { status = "Progressing", message = "the operator has not looked at this spec yet" }
end
if is_true("Failed") or is_true("Stalled") then
  return answer("Degraded")
end
if is_true("Complete") or (healthy_when_running and is_true("Running")) then
  return answer("Healthy")
end
if is_true("Suspended") then
  return answer("Suspended")
end
return answer("Progressing")
