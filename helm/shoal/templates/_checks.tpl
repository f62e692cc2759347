{{- /* What the schema cannot say. Each message names the value, and what to do. */}}
{{- define "shoal.checks" -}}
{{- include "shoal.checkNames" . -}}
{{- include "shoal.checkJobs" . -}}
{{- include "shoal.checkModel" . -}}
{{- include "shoal.checkRay" . -}}
{{- include "shoal.checkGroups" . -}}
{{- include "shoal.checkScaling" . -}}
{{- include "shoal.checkShape" . -}}
{{- include "shoal.checkMemory" . -}}
{{- include "shoal.checkReach" . -}}
{{- include "shoal.checkNamespace" . -}}
{{- end -}}

{{- define "shoal.checkNames" -}}
{{- $name := include "shoal.name" . -}}
{{- if or (gt (len $name) 40) (not (regexMatch "^[a-z]" $name)) -}}
{{- fail (printf "fullnameOverride: the release would be named %s; KubeRay takes at most 40 characters here, the first a letter: set fullnameOverride" $name) -}}
{{- end -}}
{{- range .Values.jobs -}}
{{- if gt (len (printf "%s-%s" $name (include "shoal.jobName" .))) 47 -}}
{{- fail (printf "jobs: %s-%s is longer than the 47 characters that KubeRay takes: shorten the job's name, or set fullnameOverride" $name (include "shoal.jobName" .)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Where recipes write; what `args` say of it is the caller's. */}}
{{- define "shoal.checkJobs" -}}
{{- if and .Values.jobs (not .Values.outputs.claim) -}}
{{- fail "outputs.claim is empty, but the pods of a job read what the others write, and each has /tmp and its home for itself: set outputs.claim to a claim that all pods can write, and output_dir below /outputs; pods that run already have the claim once they start again" -}}
{{- end -}}
{{- range .Values.jobs -}}
{{- $given := false -}}
{{- range .args }}{{ if hasPrefix "output_dir=" . }}{{ $given = true }}{{ end }}{{ end -}}
{{- if and .recipe (not $given) -}}
{{- $directory := .recipe.output_dir | default "" | toString -}}
{{- if not (regexMatch "^/outputs/" (clean $directory)) -}}
{{- fail (printf "jobs: recipe.output_dir of %s is %s, which the pods of the job do not share: set a directory below /outputs, such as /outputs/%s" .name ($directory | default "not given") .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "shoal.checkModel" -}}
{{- $model := .Values.model -}}
{{- $needs := dict "pvc" (list "model.pvc.claim" $model.pvc.claim) "image" (list "model.image.reference" $model.image.reference) "objectStore" (list "model.objectStore.url" $model.objectStore.url) -}}
{{- $optional := dict "pvc" (list "model.pvc.subPath" $model.pvc.subPath) "objectStore" (list "model.objectStore.secret" $model.objectStore.secret) -}}
{{- $mounted := regexMatch "^/models(/|$)" $model.path -}}
{{- if eq $model.source "bundled" -}}
{{- if $mounted -}}
{{- fail (printf "model.path is %s, where nothing is with model.source=bundled: set model.source=pvc, image or objectStore, or the path of a directory in the image" $model.path) -}}
{{- end -}}
{{- end -}}
{{- range $values := list $needs $optional -}}
{{- range $source, $value := omit $values $model.source -}}
{{- if last $value -}}
{{- fail (printf "%s is %s, which model.source=%s does not read: set model.source=%s, or leave it empty" (first $value) (last $value) $model.source $source) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with get $needs $model.source -}}
{{- if not (last .) -}}
{{- fail (printf "%s is empty, which model.source=%s needs: set it, or set model.source=bundled" (first .) $model.source) -}}
{{- end -}}
{{- if not $mounted -}}
{{- fail (printf "model.path is %s; with model.source=%s the files are under /models: set model.path=/models or a directory in it" $model.path $model.source) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "shoal.checkRay" -}}
{{- $ray := .Values.ray -}}
{{- if and (eq $ray.gcs.faultTolerance "redis") (not $ray.gcs.redisAddress) -}}
{{- fail "ray.gcs.redisAddress is empty, which ray.gcs.faultTolerance=redis needs: set host:port" -}}
{{- end -}}
{{- if ne $ray.gcs.faultTolerance "redis" -}}
{{- range $name := list "redisAddress" "redisSecret" -}}
{{- with get $ray.gcs $name -}}
{{- fail (printf "ray.gcs.%s is %s, which ray.gcs.faultTolerance=%s does not read: set ray.gcs.faultTolerance=redis, or leave it empty" $name . $ray.gcs.faultTolerance) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $ray.gcs.storageClass (ne $ray.gcs.faultTolerance "embedded") -}}
{{- fail (printf "ray.gcs.storageClass is %s, which ray.gcs.faultTolerance=%s does not read: set ray.gcs.faultTolerance=embedded, or leave it empty" $ray.gcs.storageClass $ray.gcs.faultTolerance) -}}
{{- end -}}
{{- if and $ray.tokenSecret (not $ray.tokenAuth) -}}
{{- fail (printf "ray.tokenSecret is %s, which ray.tokenAuth=false does not read: set ray.tokenAuth=true, or leave it empty" $ray.tokenSecret) -}}
{{- end -}}
{{- if and $ray.tokenAuth (semverCompare "<2.52.0" $ray.version) -}}
{{- fail (printf "ray.version is %s; ray.tokenAuth needs 2.52.0: use an image with a newer Ray, or set ray.tokenAuth=false" $ray.version) -}}
{{- end -}}
{{- range $name := list "head" "attention" "experts" -}}
{{- $memory := (get $.Values $name).memory -}}
{{- if ge (int64 $ray.objectStoreBytes) (include "shoal.bytes" $memory | int64) -}}
{{- fail (printf "ray.objectStoreBytes is %d (%s), but %s.memory is %s, and each pod's object store is in its memory: lower ray.objectStoreBytes, or raise %s.memory" (int64 $ray.objectStoreBytes) (include "shoal.gibibytes" $ray.objectStoreBytes) $name $memory $name) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.tls.serverName (not .Values.tls.secret) -}}
{{- fail (printf "tls.serverName is %s, but tls.secret is empty, so there are no certificates to name: set tls.secret, or leave tls.serverName empty" .Values.tls.serverName) -}}
{{- end -}}
{{- end -}}

{{- define "shoal.checkGroups" -}}
{{- if eq .Values.auth.apiKeyEntry .Values.auth.adminTokenEntry -}}
{{- fail (printf "auth.apiKeyEntry and auth.adminTokenEntry are both %s, which would open the admin routes to every client: name two entries" .Values.auth.apiKeyEntry) -}}
{{- end -}}
{{- $attention := .Values.attention -}}
{{- if gt (int64 $attention.maxLength) (int64 $attention.cacheTokens) -}}
{{- fail (printf "attention.maxLength is %d, but a worker's cache holds attention.cacheTokens=%d tokens: lower attention.maxLength, or raise attention.cacheTokens" (int64 $attention.maxLength) (int64 $attention.cacheTokens)) -}}
{{- end -}}
{{- if and .Values.experts.gpuMemory (not .Values.experts.gpus) -}}
{{- fail (printf "experts.gpuMemory is %s, which experts.gpus=0 does not read: set experts.gpus=1, or leave it empty" .Values.experts.gpuMemory) -}}
{{- end -}}
{{- $own := include "shoal.podLabels" (dict "root" $ "component" "") | fromYaml | keys -}}
{{- range $group := list "attention" "experts" -}}
{{- $values := get $.Values $group -}}
{{- range $key := keys $values.labels | sortAlpha -}}
{{- if or (has $key $own) (regexMatch "^(ray[.]io|shoal)/" $key) -}}
{{- fail (printf "%s.labels has %s, which the chart or KubeRay sets: leave it out" $group $key) -}}
{{- end -}}
{{- end -}}
{{- range $key, $own := dict "cpu" "cpu" "memory" "memory" $values.gpuResource "gpus" -}}
{{- if hasKey $values.extraResources $key -}}
{{- fail (printf "%s.extraResources has %s, which %s.%s sets: leave it out, and set %s.%s" $group $key $group $own $group $own) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "shoal.checkScaling" -}}
{{- $experts := .Values.experts -}}
{{- $none := kindIs "invalid" $experts.replicas -}}
{{- if and .Values.autoscaling.enabled .Values.keda.enabled -}}
{{- fail "autoscaling.enabled and keda.enabled both scale the expert pods: set one of them to false" -}}
{{- else if and .Values.keda.enabled .Values.tls.ray -}}
{{- fail "keda.enabled with tls.ray: KubeRay gives certificates to its own pods, and none to those that KEDA counts: set one of them to false" -}}
{{- else if and .Values.autoscaling.enabled (not $none) -}}
{{- fail (printf "experts.replicas is %d while autoscaling.enabled lets KubeRay choose: set experts.replicas=null, and experts.minReplicas and experts.maxReplicas as bounds" (int $experts.replicas)) -}}
{{- else if and $none (not .Values.autoscaling.enabled) -}}
{{- fail "experts.replicas is null and nothing else scales the expert pods: set experts.replicas to a number, or autoscaling.enabled=true" -}}
{{- end -}}
{{- $least := include "shoal.minReplicas" . | int -}}
{{- $wanted := ternary $least (int $experts.replicas) $none -}}
{{- if gt $wanted (int $experts.maxReplicas) -}}
{{- fail (printf "%s is %d, above experts.maxReplicas=%d: raise experts.maxReplicas" (ternary "experts.minReplicas" "experts.replicas" $none) $wanted (int $experts.maxReplicas)) -}}
{{- end -}}
{{- if and $experts.minReplicas (lt $wanted $least) -}}
{{- fail (printf "experts.replicas is %d, below experts.minReplicas=%d: lower experts.minReplicas, or leave it null" $wanted $least) -}}
{{- end -}}
{{- if and $experts.minReplicas (lt $least (int $experts.copies)) -}}
{{- fail (printf "experts.minReplicas is %d with experts.copies=%d: the service starts with so many hosts, and each copy needs a host of its own; set experts.minReplicas=%d, or leave it null" $least (int $experts.copies) (int $experts.copies)) -}}
{{- end -}}
{{- if lt $wanted (int $experts.copies) -}}
{{- fail (printf "experts.copies is %d with %d hosts: each copy needs a host of its own; set experts.replicas=%d, or fewer copies" (int $experts.copies) $wanted (int $experts.copies)) -}}
{{- end -}}
{{- $most := int .Values.model.shape.routedExperts -}}
{{- if and $most (gt $wanted $most) -}}
{{- fail (printf "experts.replicas is %d; the model has %d experts a layer: use at most so many" $wanted $most) -}}
{{- end -}}
{{- end -}}

{{- /* Whether memory can be checked, where it was asked for. */}}
{{- define "shoal.checkShape" -}}
{{- $shape := .Values.model.shape -}}
{{- $missing := list -}}
{{- range $name := list "hiddenSize" "moeIntermediateSize" "routedExperts" "moeLayers" -}}
{{- if not (get $shape $name) }}{{ $missing = append $missing $name }}{{ end -}}
{{- end -}}
{{- if and $missing (lt (len $missing) 4) -}}
{{- fail (printf "model.shape.%s is 0 while others of the shape are set: set it, as config.json has it, or all four to 0 to leave memory unchecked" (first $missing)) -}}
{{- end -}}
{{- if and (not $missing) .Values.experts.gpus (not .Values.experts.gpuMemory) -}}
{{- fail "experts.gpuMemory is empty, which the check of memory by model.shape needs where experts.gpus is 1: set it, such as 80Gi, or all of model.shape to 0" -}}
{{- end -}}
{{- end -}}

{{- define "shoal.checkMemory" -}}
{{- $room := include "shoal.roomBytes" . | int64 -}}
{{- $least := include "shoal.fewestHosts" . | int -}}
{{- $hosts := .Values.experts.minReplicas | default .Values.experts.replicas | default $least | int -}}
{{- $most := div (add (include "shoal.expertCopies" . | int64) $hosts -1) $hosts -}}
{{- $each := mul $most (include "shoal.expertBytes" . | int64) -}}
{{- if gt $each $room -}}
{{- $cpu := eq (int .Values.experts.gpus) 0 -}}
{{- $which := ternary "experts.memory" "experts.gpuMemory" $cpu -}}
{{- $given := ternary .Values.experts.memory .Values.experts.gpuMemory $cpu -}}
{{- $enough := ternary (addf $each 2147483648) (divf $each 0.9) $cpu -}}
{{- $more := ternary (printf ", or experts.replicas (and experts.minReplicas, if set) to %d" $least) "" (and (gt $room 0) (le $least (int .Values.model.shape.routedExperts))) -}}
{{- fail (printf "%s is %s, which leaves %s for experts; with %d hosts one holds %s of them: raise %s to %dGi%s" $which $given (include "shoal.gibibytes" $room) $hosts (include "shoal.gibibytes" $each) $which (divf $enough 1073741824 | ceil | int) $more) -}}
{{- end -}}
{{- end -}}

{{- /* Whether what a feature must reach can be reached. */}}
{{- define "shoal.checkReach" -}}
{{- $reads := ternary "keda.enabled" "monitoring.rules" .Values.keda.enabled -}}
{{- if and (or .Values.keda.enabled .Values.monitoring.rules) (not .Values.monitoring.podMonitor) -}}
{{- fail (printf "%s reads metrics by a label that the chart's PodMonitor gives them: set monitoring.podMonitor=true" $reads) -}}
{{- end -}}
{{- $who := list -}}
{{- if .Values.autoscaling.enabled }}{{ $who = append $who "autoscaling.enabled needs the API server" }}{{ end -}}
{{- if eq .Values.model.source "objectStore" }}{{ $who = append $who "model.source=objectStore needs the object store" }}{{ end -}}
{{- if eq .Values.ray.gcs.faultTolerance "redis" }}{{ $who = append $who "ray.gcs.faultTolerance=redis needs redis" }}{{ end -}}
{{- if and .Values.networkPolicy.enabled (ne .Values.service.type "ClusterIP") (not .Values.networkPolicy.clients) -}}
{{- fail (printf "networkPolicy.clients is empty, but service.type=%s lets callers from outside in: add them, such as {ipBlock: {cidr: 0.0.0.0/0}}, or set networkPolicy.enabled=false" .Values.service.type) -}}
{{- end -}}
{{- if and .Values.networkPolicy.enabled $who (not .Values.networkPolicy.egressCIDRs) -}}
{{- fail (printf "networkPolicy.egressCIDRs is empty, but %s: add its addresses (0.0.0.0/0 allows all), or set networkPolicy.enabled=false" (first $who)) -}}
{{- end -}}
{{- end -}}
