{{- /* Pod template of a Ray node; argument: root, component (head, attention, experts), group (its values), and command
       where the pod is not KubeRay's. */}}
{{- define "shoal.pod" -}}
{{- $expert := eq .component "experts" -}}
{{- $token := and (eq .component "head") .root.Values.autoscaling.enabled -}}
metadata:
  labels: {{- merge (include "shoal.podLabels" . | fromYaml) (.group.labels | default dict) | toYaml | nindent 4 }}
spec:
  {{- include "shoal.podCommon" (dict "root" .root "token" $token) | nindent 2 }}
  terminationGracePeriodSeconds: {{ add 30 (int (.group.drainSeconds | default 0)) }}
  {{- with .group.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels: {{- include "shoal.podLabels" . | nindent 10 }}
  {{- if eq .root.Values.model.source "objectStore" }}
  initContainers:
    - {{- include "shoal.fetchModel" .root | nindent 6 }}
  {{- end }}
  containers:
    - name: {{ ternary "ray-head" "ray-worker" (eq .component "head") }}
      {{- include "shoal.image" .root | nindent 6 }}
      {{- with .command }}
      command: ["/bin/bash", "-c"]
      args: [{{ . | quote }}]
      {{- end }}
      securityContext: {{- include "shoal.containerSecurity" .root | nindent 8 }}
      resources: {{- include "shoal.resources" .group | nindent 8 }}
      ports: {{- include (printf "shoal.ports.%s" .component) . | nindent 8 }}
      env: {{- include "shoal.nodeEnv" . | nindent 8 }}
      volumeMounts: {{- include "shoal.nodeMounts" . | nindent 8 }}
      {{- include (printf "shoal.life.%s" .component) .root | nindent 6 }}
  volumes: {{- include "shoal.nodeVolumes" . | nindent 4 }}
{{- end -}}

{{- define "shoal.fetchModel" -}}
name: fetch-model
image: {{ .Values.model.objectStore.image | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
command: {{ append (append .Values.model.objectStore.command .Values.model.objectStore.url) .Values.model.path | toJson }}
{{- with .Values.model.objectStore.secret }}
envFrom:
  - secretRef:
      name: {{ . | quote }}
{{- end }}
env:
  - name: HOME
    value: /home/shoal
securityContext: {{- include "shoal.containerSecurity" . | nindent 2 }}
{{- with .Values.model.objectStore }}
resources: # the volume bounds the storage: a limit of it here would bound the whole pod, its logs too
  requests: {cpu: {{ int .cpu }}, memory: {{ .memory | quote }}, ephemeral-storage: {{ .size | quote }}}
  limits: {cpu: {{ int .cpu }}, memory: {{ .memory | quote }}}
{{- end }}
volumeMounts:
  {{- include "shoal.scratchMounts" . | nindent 2 }}
  - name: model
    mountPath: /models
{{- end -}}

{{- define "shoal.resources" -}}
{{- $all := dict "cpu" (toString (int .cpu)) "memory" .memory -}}
{{- if .gpus }}{{ $_ := set $all .gpuResource (toString (int .gpus)) }}{{ end -}}
{{- range $name, $amount := .extraResources }}{{ $_ := set $all $name (toString $amount) }}{{ end -}}
requests: {{- toYaml $all | nindent 2 }}
limits: {{- toYaml $all | nindent 2 }}
{{- end -}}

{{- define "shoal.ports.head" -}}
- {name: gcs-server, containerPort: 6379}
- {name: dashboard, containerPort: 8265}
- {name: client, containerPort: 10001}
{{ include "shoal.ports.attention" . }}
{{- end -}}

{{- define "shoal.ports.attention" -}}
- {name: serve, containerPort: 8000}
{{ include "shoal.ports.experts" . }}
{{- end -}}

{{- define "shoal.ports.experts" -}}
- {name: metrics, containerPort: 8080}
{{- end -}}

{{- /* Probes and the end of a container. KubeRay adds the probes that are missing. */}}
{{- define "shoal.life.head" -}}
{{- end -}}

{{- define "shoal.life.attention" -}}
readinessProbe: # Serve's proxy is there with a worker, and says when it leaves
  httpGet: {path: /-/healthz, port: serve}
  periodSeconds: 2
  timeoutSeconds: 2
lifecycle:
  preStop: {{- include "shoal.preStop" (printf "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'the pod stops' --deadline-remaining-seconds %d; sleep %d" (int .Values.attention.drainSeconds) (int .Values.attention.drainSeconds)) | nindent 4 }}
{{- end -}}

{{- define "shoal.life.experts" -}}
lifecycle:
  preStop: {{- include "shoal.preStop" (include "shoal.drainHere" .) | nindent 4 }}
{{- end -}}

{{- define "shoal.preStop" -}}
exec:
  command: ["/bin/bash", "-c", {{ . | quote }}]
{{- end -}}
