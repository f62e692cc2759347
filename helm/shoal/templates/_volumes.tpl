{{- /* Environment of a Ray node; argument as of shoal.pod. */}}
{{- define "shoal.nodeEnv" -}}
{{ include "shoal.env" (dict "root" .root "api" true "admin" true) }}
- name: POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
- name: RAY_worker_niceness # else Ray runs its actors at almost the lowest priority
  value: "0"
- name: RAY_SERVE_PROXY_USE_GRPC # from the ingress to Serve's proxies: an event of a stream costs less
  value: "1"
- name: RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP # nor does it pass from one of a proxy's threads to another
  value: "0"
- name: RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S # Serve kills a proxy that is not ready by then; 5 s are few on a busy node
  value: "30"
- name: RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S # a proxy that has ended is known by three checks that fail, else of 10 s
  value: "1"
- name: RAY_TRAIN_HEALTH_CHECK_INTERVAL_S # the end of a training run's workers, and their loss, are seen by then
  value: "0.5"
- name: RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO
  value: "0"
{{- if .command }}
{{- include "shoal.rayTokenEnv" .root | nindent 0 }}
{{- if ne .root.Values.ray.gcs.faultTolerance "none" }}
- name: RAY_gcs_rpc_server_reconnect_timeout_s # as KubeRay has it: a head that comes back is waited for
  value: "600"
{{- end }}
{{- end }}
{{- end -}}

{{- /* What Ray's commands need where KubeRay does not set it. */}}
{{- define "shoal.rayTokenEnv" -}}
{{- if .Values.ray.tokenAuth -}}
- name: RAY_AUTH_MODE
  value: token
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .Values.ray.tokenSecret | default (include "shoal.name" .) | quote }}
      key: auth_token
{{- end }}
{{- end -}}

{{- /* Argument as of shoal.pod. */}}
{{- define "shoal.nodeMounts" -}}
{{ include "shoal.scratchMounts" .root }}
{{- with .root.Values }}
{{- if ne .model.source "bundled" }}
- name: model
  mountPath: /models
  readOnly: true
  {{- if and (eq .model.source "pvc") .model.pvc.subPath }}
  subPath: {{ .model.pvc.subPath | quote }}
  {{- end }}
{{- end }}
{{- if .tls.secret }}
- name: tls
  mountPath: /etc/shoal/tls
  readOnly: true
{{- end }}
- name: recipes
  mountPath: /etc/shoal/recipes
  readOnly: true
{{- if .outputs.claim }}
- name: outputs
  mountPath: /outputs
{{- end }}
{{- end }}
{{- if .command }}
- name: shared-mem
  mountPath: /dev/shm
{{- end }}
{{- end -}}

{{- define "shoal.nodeVolumes" -}}
{{ include "shoal.scratchVolumes" .root }}
{{- with .root.Values.model }}
{{- if eq .source "pvc" }}
- name: model
  persistentVolumeClaim:
    claimName: {{ .pvc.claim | quote }}
    readOnly: true
{{- else if eq .source "image" }}
- name: model
  image:
    reference: {{ .image.reference | quote }}
    pullPolicy: {{ $.root.Values.image.pullPolicy }}
{{- else if eq .source "objectStore" }}
- name: model
  emptyDir:
    sizeLimit: {{ .objectStore.size | quote }}
{{- end }}
{{- end }}
{{- with .root.Values.tls.secret }}
- name: tls
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0440
{{- end }}
- name: recipes # there or not: a job that is added later finds its recipe here without a restart
  configMap:
    name: {{ include "shoal.name" .root }}-recipes
    optional: true
{{- with .root.Values.outputs.claim }}
- name: outputs
  persistentVolumeClaim:
    claimName: {{ . | quote }}
{{- end }}
{{- if .command }}
- name: shared-mem # KubeRay adds it to its own pods
  emptyDir:
    medium: Memory
{{- end }}
{{- end -}}
